"""The choice of a token for each row of logits: plain draws, and a `Chooser` of all else, with the reference of both.

A chooser also applies what a request changes about its logits. That is kept from step to step, here and on the device:
a step sends what is new.

Shapes: S rows of logits, R of them sampled, D of these drawn, P of them changed, M masks, V vocabulary, W words of 32
bits, C columns or candidates, N rows of weights, B columns of a block, K best tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

MAX_TOP = 20  # log-probabilities of a row's best tokens
EDIT = np.dtype([("token", "<i4"), ("bias", "<f4"), ("factor", "<f4"), ("added", "<f4")])
NEW_EDIT = np.dtype([("place", "<i4"), *((name, EDIT[name]) for name in EDIT.names or ())])
_BLOCK = 512
_CANDIDATES = (72, 512, 4096)  # numbers of best tokens to try; if top-k or top-p may need more, the row is sorted
_GROUP = 32
_SCORED_ROWS = 32  # at a time, to bound the memory that is needed beside the logits
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

    def part(self, places: Sequence[int]) -> Draws:
        rows, masks = ([column[i] for i in places] for column in (self.rows, self.masks))
        columns = (self.temperature, self.min_p, self.uniform)
        temperature, min_p, uniform = ([column[i] for i in places] for column in columns)
        return Draws(rows, temperature, min_p, uniform, masks, self.words_MW)


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

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Give the fields of EDIT of all entries."""
        return {name: column[: len(self)] for name, column in self._columns.items()}

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
        of = self.tokens = np.fromiter(tokens, np.int64)
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


class ReferenceChooser:
    """A Chooser in torch, on any device, which reads at once. `sample` is as `Ops.sample`, and draws in all rows from
    which any token may be drawn.
    """

    def __init__(self, sample: Callable[[Tensor, Draws], Drawn]) -> None:
        self._sample = sample

    def __call__(
        self,
        logits_SV: Tensor,
        plain: Draws,
        changed: Draws,
        changes: Sequence[Change],
        slots: TokenSlots | None = None,
    ) -> Callable[[], Chosen]:
        vocab, num_plain = logits_SV.shape[1], len(plain.rows)
        tokens, best = [0] * (num_plain + len(changes)), [math.nan] * (num_plain + len(changes))
        other = [i for i, c in enumerate(changes) if c.edits or c.forbidden or c.allowed is not None or _cuts(c, vocab)]
        same = sorted(set(range(len(changes))) - set(other))

        def take(places: Iterable[int], found: tuple[Sequence[int], Sequence[float]]) -> None:
            for place, token, value in zip(places, *found, strict=True):
                tokens[place], best[place] = token, value

        if plain.rows:
            take(range(num_plain), self._sample(logits_SV, plain)())
        if same:
            take([num_plain + i for i in same], self._sample(logits_SV, changed.part(same))())
        if other:
            own, draws = [changes[i] for i in other], changed.part(other)
            take([num_plain + i for i in other], self._choose(altered(logits_SV, draws, own), draws, own))
        if slots is not None:
            rows = [*plain.rows, *changed.rows]
            slots.tokens[slots.slots_S[rows]] = torch.tensor(tokens, device=slots.tokens.device)
        scores: list[Scores | None] = [None] * len(tokens)
        asked = [i for i, c in enumerate(changes) if c.num_top is not None and math.isfinite(best[num_plain + i])]
        for start in range(0, len(asked), _SCORED_ROWS):
            some = asked[start : start + _SCORED_ROWS]
            num_top = [changes[i].num_top or 0 for i in some]
            chosen_R = torch.tensor([tokens[num_plain + i] for i in some], device=logits_SV.device)
            found = score_tokens(logits_SV[[changed.rows[i] for i in some]], chosen_R, max(num_top))
            for i, own_scores in zip(some, read_scores([found], num_top), strict=True):
                scores[num_plain + i] = own_scores
        chosen = Chosen(tokens, best, scores)
        return lambda: chosen

    def _choose(self, x_PV: Tensor, draws: Draws, changes: Sequence[Change]) -> tuple[Sequence[int], Sequence[float]]:
        """Choose from logits to which the changes have been made."""
        num, vocab = x_PV.shape
        tokens, best = [0] * num, x_PV.amax(dim=1).tolist()
        is_cut = [t > 0 and _cuts(c, vocab) for t, c in zip(draws.temperature, changes, strict=True)]
        if whole := [i for i in range(num) if not is_cut[i]]:
            own = draws.part(whole)
            unmasked = Draws(whole, own.temperature, own.min_p, own.uniform, [-1] * len(whole))
            for i, token in zip(whole, self._sample(x_PV, unmasked)()[0], strict=True):
                tokens[i] = token
        if cut := [i for i in range(num) if is_cut[i] and math.isfinite(best[i])]:
            own = draws.part(cut)
            uniform_N = torch.tensor(own.uniform, dtype=torch.float64, device=x_PV.device)
            for rows, p_NC, ids_NC in candidates(rows_of(x_PV, cut), own, [changes[i] for i in cut]):
                token_N1 = ids_NC.gather(1, draw(p_NC, uniform_N[rows])[:, None])
                for row, token in zip(rows, token_N1.flatten().tolist(), strict=True):
                    tokens[cut[row]] = token
        return tokens, best


def _cuts(change: Change, vocab: int) -> bool:
    """Say whether top-k or top-p may take something away."""
    return 0 < change.top_k < vocab or change.top_p < 1


def altered(logits_SV: Tensor, draws: Draws, changes: Sequence[Change]) -> Tensor:
    """Make new logits of the draws' rows, (P, V), with masks and changes."""
    x_PV = rows_of(logits_SV, draws.rows)
    x_PV = allowed(x_PV.clone() if x_PV is logits_SV else x_PV, draws.masks, draws.words_MW)
    for x_V, change in zip(x_PV, changes, strict=True):
        if change.allowed is not None:
            at = torch.from_numpy(change.allowed.tokens).to(x_V.device)
            own = x_V[at]
            x_V.fill_(-math.inf)
            x_V[at] = own
    if any(change.forbidden for change in changes):
        x_PV[_places([c.forbidden for c in changes], x_PV.device)] = -math.inf
    edited = [(i, c.edits.columns()) for i, c in enumerate(changes) if c.edits]
    if edited:
        columns: list[Sequence[int] | npt.NDArray[Any]] = [()] * len(changes)
        for i, own_columns in edited:
            columns[i] = own_columns["token"]
        at_P = _places(columns, x_PV.device)
        bias, factor, added = (
            torch.from_numpy(np.concatenate([own_columns[name] for _, own_columns in edited])).to(x_PV.device)
            for name in ("bias", "factor", "added")
        )
        x = x_PV[at_P] + bias
        x_PV[at_P] = torch.where(x > 0, x / factor, x * factor) + added
    return x_PV


def _places(tokens: Sequence[Sequence[int] | npt.NDArray[Any]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Find rows and columns of the tokens of each row."""
    rows = np.repeat(np.arange(len(tokens)), [len(own) for own in tokens])
    columns = np.concatenate([np.asarray(own, dtype=np.int64) for own in tokens])
    return torch.from_numpy(rows).to(device), torch.from_numpy(columns).to(device)


class Candidates(NamedTuple):
    """Weights of the tokens that may be drawn, for these rows; they need not sum to 1."""

    rows: list[int]
    p_NC: Tensor
    ids_NC: Tensor


def candidates(logits_NV: Tensor, draws: Draws, changes: Sequence[Change]) -> list[Candidates]:
    """Apply temperature, min-p (Nguyen et al., 2024), top-k, top-p (Holtzman et al., 2020), each renormalised."""
    p_NV = scaled(logits_NV, logits_NV.amax(dim=1), draws.temperature, draws.min_p).softmax(dim=1)
    vocab = p_NV.shape[1]
    left = list(range(len(changes)))
    out = []
    for width in (*(n for n in _CANDIDATES if n < vocab), vocab):
        if left:
            p_NC, ids_NC, complete = _cut(p_NV[left], [changes[i] for i in left], width)
            done = [i for i, ok in enumerate(complete) if ok]
            out.append(Candidates([left[i] for i in done], p_NC[done], ids_NC[done]))
            left = [row for row, ok in zip(left, complete, strict=True) if not ok]
    return out


def _cut(p_NV: Tensor, changes: Sequence[Change], width: int) -> tuple[Tensor, Tensor, list[bool]]:
    """The weights and ids of each row's `width` best tokens, equals by their ids, 0 beyond top-k and top-p; and for
    each row whether the tokens beyond `width` would all be cut.
    """
    p_NC, ids_NC = _by_token(*_best(p_NV, width))
    vocab, last_N1 = p_NV.shape[1], p_NC[:, -1:]
    k_N1 = torch.tensor([min(c.top_k or vocab, vocab) for c in changes], device=p_NV.device).unsqueeze(1)
    top_p_N1 = torch.tensor([c.top_p for c in changes], dtype=torch.float64, device=p_NV.device).unsqueeze(1)
    p_NC = p_NC.masked_fill(torch.arange(width, device=p_NV.device) >= k_N1, 0)
    mass_NC = p_NC.cumsum(dim=1, dtype=torch.float64)
    wanted_N1 = torch.where(k_N1 <= width, top_p_N1 * mass_NC[:, -1:], top_p_N1)
    complete_N1 = (k_N1 <= width) | ((k_N1 == vocab) & (mass_NC[:, -1:] >= wanted_N1))
    p_NC = p_NC.masked_fill(mass_NC - p_NC >= wanted_N1, 0)  # the mass before this token has reached top_p
    if width < vocab:  # equals of the last token, some of which are not among the candidates, are taken by their ids
        complete_N1 &= p_NC.where(p_NC > 0, math.inf).amin(dim=1, keepdim=True) > last_N1
    return p_NC, ids_NC, complete_N1.flatten().tolist()


def _by_token(p_NC: Tensor, ids_NC: Tensor) -> tuple[Tensor, Tensor]:
    """Sort: the best first, equals by their ids."""
    ids_NC, order_NC = ids_NC.sort(dim=1)
    p_NC, order_NC = p_NC.gather(1, order_NC).sort(dim=1, descending=True, stable=True)
    return p_NC, ids_NC.gather(1, order_NC)


def _best(p_NV: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Find torch.topk over fewer columns: the best tokens are in the groups with the best maxima."""
    num_groups, odd = divmod(p_NV.shape[1], _GROUP)
    if odd or 4 * width > num_groups:
        best = p_NV.topk(width)
        return best.values, best.indices
    group_NC = p_NV.view(-1, _GROUP, num_groups).amax(dim=1).topk(width).indices
    members = num_groups * torch.arange(_GROUP, device=p_NV.device).unsqueeze(1)
    ids_NC = (group_NC.unsqueeze(1) + members).flatten(1)
    best = p_NV.gather(1, ids_NC).topk(width)
    return best.values, ids_NC.gather(1, best.indices)


class TokenScores(NamedTuple):
    """The log-probability and rank of each row's token, and its K best tokens, where the logits are."""

    own_R: Tensor
    rank_R: Tensor
    ids_RK: Tensor
    logprobs_RK: Tensor


def score_tokens(logits_RV: Tensor, tokens_R: Tensor, num_top: int) -> TokenScores:
    logprobs_RV = logits_RV.log_softmax(dim=1)
    own_R1 = logprobs_RV.gather(1, tokens_R[:, None])
    rank_R = (logprobs_RV > own_R1).sum(dim=1) + 1
    top = logprobs_RV.topk(num_top, dim=1)
    return TokenScores(own_R1.flatten(), rank_R, top.indices, top.values)


def read_scores(found: Sequence[TokenScores], num_top: Sequence[int]) -> Iterator[Scores]:
    """Read all rows of `found`; each field is read at once. `num_top`: of each row."""
    own, ranks, ids, logprobs = (
        torch.cat([field.flatten() for field in fields]).tolist() for fields in zip(*found, strict=True)
    )
    widths = (scores.ids_RK.shape[1] for scores in found for _ in range(len(scores.own_R)))
    at = 0
    for value, rank, n, width in zip(own, ranks, num_top, widths, strict=True):
        yield Scores(value, rank, ids[at : at + n], logprobs[at : at + n])
        at += width
