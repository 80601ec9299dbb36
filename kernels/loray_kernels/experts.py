"""Tokens put together by expert, for products with one expert's matrices at a time.

Shapes: T tokens, E experts, K experts of a token, P = T K pairs of a token and one of its experts, D hidden.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

from torch import Tensor


class ExpertGroups(NamedTuple):
    """Pairs of a token and one of its experts, put together by expert, each expert's in the tokens' order.

    tokens_P      the token of each pair
    places_TK     the pair of each token and its first, second … expert
    rows          the pairs of each expert
    """

    tokens_P: Tensor
    places_TK: Tensor
    rows: tuple[slice, ...]

    @classmethod
    def of(cls, experts_TK: Tensor, num_experts: int) -> ExpertGroups:
        flat_P, per_token = experts_TK.flatten(), experts_TK.shape[1]
        order_P = flat_P.argsort(stable=True)
        ends = flat_P.bincount(minlength=num_experts).cumsum(0).tolist()
        rows = tuple(slice(start, stop) for start, stop in pairwise([0, *ends]))
        return cls(order_P // per_token, order_P.argsort().view_as(experts_TK), rows)

    def summed(self, y_PD: Tensor, shares_TK: Tensor) -> Tensor:
        """Add up each token's pairs in their shares, (T, D)."""
        sum_TD = y_PD[self.places_TK[:, 0]].float() * shares_TK[:, :1]
        for k in range(1, shares_TK.shape[1]):
            sum_TD += y_PD[self.places_TK[:, k]].float() * shares_TK[:, k : k + 1]
        return sum_TD.to(y_PD.dtype)
