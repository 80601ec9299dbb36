"""Tokens put together by expert, for products with one expert's matrices at a time.

Shapes: T tokens, E experts, K experts of a token, P = T K pairs of a token and one of its experts, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from loray_kernels.descriptors import INPUTS, RowTables
from loray_kernels.ops import AdapterSegments, LoraTable


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

    def runs(self, segments: AdapterSegments, num_tokens: int) -> AdapterRuns:
        """Find the runs of pairs that have an expert and an adapter in common."""
        num = len(segments.start) + 1
        adapter_T = torch.zeros(num_tokens, dtype=torch.int64)  # 0: the base
        for n, (start, stop) in enumerate(zip(segments.start, segments.stop, strict=True), 1):
            adapter_T[start:stop] = n
        lengths = torch.tensor([rows.stop - rows.start for rows in self.rows])
        expert_P = torch.arange(len(self.rows)).repeat_interleave(lengths)
        both_P = expert_P * num + adapter_T[self.tokens_P.cpu()]
        values, counts = torch.unique_consecutive(both_P, return_counts=True)
        ends = counts.cumsum(0).tolist()
        found = [
            (value // num, value % num - 1, end - count, end)
            for value, count, end in zip(values.tolist(), counts.tolist(), ends, strict=True)
            if value % num
        ]
        experts, adapters, starts, stops = zip(*found, strict=True) if found else ((), (), (), ())
        return AdapterRuns(AdapterSegments(starts, stops), experts, adapters)

    def summed(self, y_PD: Tensor, shares_TK: Tensor) -> Tensor:
        """Add up each token's pairs in their shares, (T, D)."""
        sum_TD = y_PD[self.places_TK[:, 0]].float() * shares_TK[:, :1]
        for k in range(1, shares_TK.shape[1]):
            sum_TD += y_PD[self.places_TK[:, k]].float() * shares_TK[:, k : k + 1]
        return sum_TD.to(y_PD.dtype)


class AdapterRuns(NamedTuple):
    """Pairs of one expert and one adapter are neighbours: `segments` of them, with the numbers of both."""

    segments: AdapterSegments
    experts: tuple[int, ...]
    adapters: tuple[int, ...]

    def table(self, table: LoraTable, num_experts: int) -> LoraTable:
        """Take the rows of each run's expert from those of all of its adapter's experts."""
        ranks = [table.ranks[adapter] // num_experts for adapter in self.adapters]
        firsts = [
            table.rank_start[adapter] + expert * rank
            for expert, adapter, rank in zip(self.experts, self.adapters, ranks, strict=True)
        ]
        numbers = [row for first, rank in zip(firsts, ranks, strict=True) for row in range(first, first + rank)]
        rows_R = torch.tensor(numbers, dtype=torch.int64, device=table.a.segments[0][2].device)
        a, b = (RowTables(tuple((c, w, o[rows_R]) for c, w, o in rows.segments)) for rows in (table.a, table.b))
        return LoraTable(a, b, tuple(accumulate(ranks, initial=0)), tuple(table.scale[n] for n in self.adapters))


def has_expert_lora(lora: Mapping[str, LoraTable]) -> bool:
    """Say whether a layer's tables have LoRA of experts."""
    return any(module in lora for modules in INPUTS[2:] for module in modules)
