"""A token for each row of logits, in torch: the reference of `Ops.sample`, and the draw that it shares with others.

Shapes: S rows of logits, R of them sampled, D of these drawn, M masks, V vocabulary, W words of 32 bits, C columns,
N rows of weights, B columns of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 512
_BELOW_ONE = 1 - 2**-52


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """How a token is chosen for each of R rows.

    rows         of the logits
    temperature  of each; 0 takes the best token, the first of equals
    min_p        of each: tokens with less than this share of the best one's probability are not drawn (Nguyen et al.,
                 2024); after the temperature
    uniform      of each, in [0, 1): which token of the cumulative distribution
    masks        of each, a row of `words_MW`; −1 where all tokens are allowed
    words_MW     int32 on the CPU: bit t % 32 of word t // 32 is set where token t is allowed
    """

    rows: Sequence[int]
    temperature: Sequence[float]
    min_p: Sequence[float]
    uniform: Sequence[float]
    masks: Sequence[int]
    words_MW: Tensor | None = None


class TokenSeats(NamedTuple):
    """Where drawn tokens stay on the device, so that the next step needs no host to begin with them; int64.

    seats_S  of each row of logits
    tokens   by seat
    """

    seats_S: Tensor
    tokens: Tensor


# Waits for what has been drawn: the tokens, and the largest of each row's allowed logits; where that is not finite the
# token has no meaning.
Drawn = Callable[[], tuple[list[int], list[float]]]


def sample(logits_SV: Tensor, draws: Draws) -> tuple[list[int], list[float]]:
    """The tokens, and the largest of each row's allowed logits; where that is not finite the token has no meaning."""
    x_RV = rows_of(logits_SV, draws.rows)
    if any(m >= 0 for m in draws.masks):
        x_RV = allowed(x_RV.clone() if x_RV is logits_SV else x_RV, draws.masks, draws.words_MW)
    best_R, token_R = x_RV.max(dim=1)  # max() gives NaN if there is one, so no second pass is needed
    tokens, best = token_R.tolist(), best_R.tolist()
    drawn = [i for i, t in enumerate(draws.temperature) if t and math.isfinite(best[i])]
    if drawn:
        temperature, min_p = [draws.temperature[i] for i in drawn], [draws.min_p[i] for i in drawn]
        x_DV = scaled(rows_of(x_RV, drawn), best_R[drawn], temperature, min_p)
        uniform_D = torch.tensor([draws.uniform[i] for i in drawn], dtype=torch.float64, device=x_DV.device)
        for i, token in zip(drawn, draw(x_DV.exp_(), uniform_D).tolist(), strict=True):
            tokens[i] = token
    return tokens, best


def allowed(x_RV: Tensor, masks: Sequence[int], words_MW: Tensor | None) -> Tensor:
    """`x_RV` with −∞ for tokens that are not allowed; `masks` and `words_MW` as in `Draws`. Writes `x_RV`."""
    masked = [i for i, m in enumerate(masks) if m >= 0]
    if not masked:
        return x_RV
    assert words_MW is not None
    own_MW = words_MW[[masks[i] for i in masked]].to(x_RV.device)
    bits = torch.arange(32, dtype=torch.int32, device=x_RV.device)
    denied_MV = ((own_MW.unsqueeze(2) >> bits) & 1 == 0).flatten(1)[:, : x_RV.shape[1]]
    x_RV[masked] = x_RV[masked].masked_fill(denied_MV, -math.inf)
    return x_RV


def rows_of(x_SV: Tensor, rows: Sequence[int]) -> Tensor:
    """These rows; `x_SV` itself, without a copy, if they are all of them in order."""
    return x_SV if list(rows) == list(range(len(x_SV))) else x_SV[list(rows)]


def scaled(x_NV: Tensor, best_N: Tensor, temperature: Sequence[float], min_p: Sequence[float]) -> Tensor:
    """New logits, 0 for the best of each row: after the temperature, and −∞ below min-p."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=x_NV.dtype, device=x_NV.device).unsqueeze(1)

    out_NV = x_NV - best_N.unsqueeze(1)
    if any(t != 1 for t in temperature):
        out_NV /= column(temperature)
    if any(min_p):
        out_NV.masked_fill_(out_NV < column([log_share(p) for p in min_p]), -math.inf)
    return out_NV


def log_share(min_p: float) -> float:
    """−∞ for 0."""
    return math.log(min_p) if min_p else -math.inf


def draw(p_NC: Tensor, uniform_N: Tensor) -> Tensor:
    """Columns (N), by inverting the cumulative distribution: first over blocks of columns, then in one block. The
    weights need not sum to 1; a column without weight is never drawn.
    """
    num_columns = p_NC.shape[1]
    num_whole = num_columns // _BLOCK
    rest = p_NC[:, num_whole * _BLOCK :].sum(dim=1, keepdim=True, dtype=torch.float64)
    blocks = p_NC[:, : num_whole * _BLOCK].view(len(p_NC), num_whole, _BLOCK).sum(dim=2)
    block_N1, within_N1 = _invert(torch.cat((blocks, rest), dim=1), uniform_N.unsqueeze(1))
    column_NB = block_N1 * _BLOCK + torch.arange(_BLOCK, device=p_NC.device)
    p_NB = p_NC.gather(1, column_NB.clamp(max=num_columns - 1)).masked_fill(column_NB >= num_columns, 0)
    offset_N1, _ = _invert(p_NB, within_N1)
    return (block_N1 * _BLOCK + offset_N1).squeeze(1)


def _invert(weight_NM: Tensor, uniform_N1: Tensor) -> tuple[Tensor, Tensor]:
    """The column in which the cumulative weight passes the uniform share of its total, and how far into it, [0, 1)."""
    mass_NM = weight_NM.cumsum(dim=1, dtype=torch.float64)
    target_N1 = uniform_N1 * mass_NM[:, -1:]
    found_N1 = torch.searchsorted(mass_NM, target_N1, right=True)  # never finds a column without weight
    weight_N1 = weight_NM.gather(1, found_N1).double()
    before_N1 = mass_NM.gather(1, found_N1) - weight_N1
    return found_N1, ((target_N1 - before_N1) / weight_N1).clamp(0, _BELOW_ONE)
