"""The choice of a token for each row of logits: the reference for plain draws, and the protocol of a `Chooser`.

A chooser also applies what a request changes about its logits. That is kept from step to step, here and on the device:
a step sends what is new.

Shapes: S rows of logits, R of them sampled, D of these drawn, M masks, V vocabulary, W words of 32 bits, C columns,
N rows of weights, B columns of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

MAX_TOP = 20  # log-probabilities of a row's best tokens
EDIT = np.dtype([("token", "<i4"), ("bias", "<f4"), ("factor", "<f4"), ("added", "<f4")])
NEW_EDIT = np.dtype([("place", "<i4"), *((name, EDIT[name]) for name in EDIT.names or ())])
_BLOCK = 512
_BELOW_ONE = 1 - 2**-52


@dataclass(frozen=True, slots=True, eq=False)
class Draws:
    """The choice of a token for each of R rows.

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


class TokenSlots(NamedTuple):
    """The places of drawn tokens on the device, so that the next step needs no host to begin with them; int64.

    slots_S  of each row of logits
    tokens   by slot
    """

    slots_S: Tensor
    tokens: Tensor


# Waits for what has been drawn: the tokens, and the largest of each row's allowed logits; where that is not finite the
# token has no meaning.
Drawn = Callable[[], tuple[list[int], list[float]]]


def sample(logits_SV: Tensor, draws: Draws) -> tuple[list[int], list[float]]:
    """Draw at once, with the result of a `Drawn`."""
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
    """Write −∞ to `x_RV` for tokens that are not allowed, and return it; `masks` and `words_MW` are as in `Draws`."""
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
    """Copy these rows; give `x_SV` itself if they are all of them in order."""
    return x_SV if list(rows) == list(range(len(x_SV))) else x_SV[list(rows)]


def scaled(x_NV: Tensor, best_N: Tensor, temperature: Sequence[float], min_p: Sequence[float]) -> Tensor:
    """Make new logits, 0 for the best of each row: after the temperature, and −∞ below min-p."""

    def column(values: Sequence[float]) -> Tensor:
        return torch.tensor(values, dtype=x_NV.dtype, device=x_NV.device).unsqueeze(1)

    out_NV = x_NV - best_N.unsqueeze(1)
    if any(t != 1 for t in temperature):
        out_NV /= column(temperature)
    if any(min_p):
        out_NV.masked_fill_(out_NV < column([log_share(p) for p in min_p]), -math.inf)
    return out_NV


def log_share(min_p: float) -> float:
    """The natural logarithm; −∞ for 0."""
    return math.log(min_p) if min_p else -math.inf


def draw(p_NC: Tensor, uniform_N: Tensor) -> Tensor:
    """Draw a column of each row, (N,), by inverting the cumulative distribution: first over blocks of columns, then in
    one block. The weights need not sum to 1; a column without weight is never drawn.
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


class TokenEdits:
    """The edits of one request's logits: x of a token becomes x + bias; then / factor if it is positive, else · factor;
    then + added. All in fp32. Other tokens have a bias of 0 and a factor of 1, and 0 is added.

    `there` belongs to the chooser: the entries on its device.
    """

    def __init__(self) -> None:
        self._places: dict[int, int] = {}
        self._new: set[int] = set()
        self._columns = {name: np.zeros(0, dtype=EDIT[name]) for name in EDIT.names or ()}
        self.there: Tensor | None = None

    def __len__(self) -> int:
        return len(self._places)

    def set(self, token: int, factor: float | None, added: float | None) -> None:
        """Set what is not None."""
        place = self._place(token)
        if place >= self.capacity:
            self._grow()
        self._columns["token"][place] = token
        if factor is not None:
            self._columns["factor"][place] = factor
        if added is not None:
            self._columns["added"][place] = added
        self._new.add(place)

    def set_all(self, name: str, tokens: npt.NDArray[np.int64], values: npt.NDArray[np.float64]) -> None:
        """Set one of bias, factor, added of many tokens."""
        places = [self._place(token) for token in tokens.tolist()]
        while len(self) > self.capacity:
            self._grow()
        self._columns["token"][places], self._columns[name][places] = tokens, values
        self._new.update(places)

    def _place(self, token: int) -> int:
        return self._places.setdefault(token, len(self._places))

    def _grow(self) -> None:
        more = max(64, len(self), self.capacity)
        for name, column in self._columns.items():
            added = np.full(more, name == "factor", dtype=column.dtype)
            self._columns[name] = np.concatenate((column, added))

    @property
    def capacity(self) -> int:
        """The number of entries that there is room for."""
        return len(self._columns["token"])

    def take_new(self, *, everything: bool) -> npt.NDArray[np.void]:
        """Give the entries that are new, or are now others, since the last call: NEW_EDIT."""
        places = np.arange(len(self)) if everything else np.fromiter(self._new, np.int64, len(self._new))
        self._new.clear()
        out = np.empty(len(places), dtype=NEW_EDIT)
        out["place"] = places
        for name in EDIT.names or ():
            out[name] = self._columns[name][places]
        return out


class TokenSet:
    """The tokens that a request may have. `there` belongs to the chooser: the words on its device."""

    def __init__(self, tokens: Iterable[int], vocab_size: int) -> None:
        of = np.fromiter(tokens, np.int64)
        words = np.zeros(-(-vocab_size // 32), dtype=np.uint32)
        np.bitwise_or.at(words, of // 32, np.uint32(1) << (of % 32).astype(np.uint32))
        self.words_W = torch.from_numpy(words.view(np.int32))
        self.there: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Change:
    """The changes of one row, beside what `Draws` has.

    edits      None: none
    forbidden  further tokens that may not be next, each once
    allowed    None: all tokens
    top_k      0: all tokens
    top_p      1: all tokens; of those that top-k leaves (Holtzman et al., 2020)
    num_top    log-probabilities of so many best tokens and of the chosen one, at most MAX_TOP; None: none
    """

    edits: TokenEdits | None = None
    forbidden: Sequence[int] = ()
    allowed: TokenSet | None = None
    top_k: int = 0
    top_p: float = 1.0
    num_top: int | None = None


class Scores(NamedTuple):
    """Natural logarithms of probabilities, of the unchanged logits without temperature.

    `rank` is 1 for the best token; `tokens` and `logprobs` are those of the best ones. Where the best of these logits
    is not finite, `logprob` is NaN, and `tokens` and `logprobs` may be empty.
    """

    logprob: float
    rank: int
    tokens: list[int]
    logprobs: list[float]


class Chosen(NamedTuple):
    """The results of `Ops.sample`, and the scores of rows that want them."""

    tokens: list[int]
    best: list[float]
    scores: list[Scores | None]


class Chooser(Protocol):
    """Owns what is on the device for choosing. For one thread."""

    def __call__(
        self,
        logits_SV: Tensor,
        plain: Draws,
        changed: Draws,
        changes: Sequence[Change],
        slots: TokenSlots | None = None,
    ) -> Callable[[], Chosen]:
        """Choose for the rows of `plain`, then for those of `changed`, to which `changes` belong. Each row is in one of
        them, once. May write `logits_SV`, and puts back what it had. The result is read, and written to `slots`, as
        that of `Ops.sample`.

        A draw takes tokens in the order of their ids; in rows with top-k or top-p from the best to the worst, equals by
        their ids.
        """
        ...
