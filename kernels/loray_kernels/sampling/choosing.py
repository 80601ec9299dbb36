"""Rows of logits that are changed before a token is chosen, or cut by top-k or top-p, or whose log-probabilities are
wanted, for a backend that does all of it where the logits are (`Ops.chooser`).

What a request changes is kept from step to step, here and on the device: a step sends what is new.

Shapes: S rows of logits, V vocabulary, W words of 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from loray_kernels.sampling.draws import Draws, TokenSeats

MAX_TOP = 20  # log-probabilities of a row's best tokens
EDIT = np.dtype([("token", "<i4"), ("bias", "<f4"), ("factor", "<f4"), ("added", "<f4")])
NEW_EDIT = np.dtype([("place", "<i4"), *((name, EDIT[name]) for name in EDIT.names or ())])


class TokenEdits:
    """Of one request: the logit x of a token becomes x + bias; then / factor if it is positive, else · factor; then +
    added. All in fp32. Other tokens have a bias of 0 and a factor of 1, and 0 is added.

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
        """What is None stays as it is."""
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
        """One of bias, factor, added of many tokens."""
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
        """Entries that there is room for."""
        return len(self._columns["token"])

    def take_new(self, *, everything: bool) -> npt.NDArray[np.void]:
        """Entries that are new, or are now others, since the last call: NEW_EDIT."""
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
    """Of one row, beside what `Draws` has.

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
    """Natural logarithms of probabilities, of the unchanged logits without temperature. `rank`: 1 for the best token;
    `tokens` and `logprobs`: of the best ones. Where the best of these logits is not finite, `logprob` is NaN, and
    `tokens` and `logprobs` may be empty.
    """

    logprob: float
    rank: int
    tokens: list[int]
    logprobs: list[float]


class Chosen(NamedTuple):
    """As from `Ops.sample`; and the scores of rows that want them."""

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
        seats: TokenSeats | None = None,
    ) -> Callable[[], Chosen]:
        """Of the rows of `plain`, then of those of `changed`, to which `changes` belong. Each row is in one of them,
        once. May write `logits_SV`, and puts back what it had. The result is read, and written to `seats`, as that of
        `Ops.sample`.

        A draw takes tokens in the order of their ids; in rows with top-k or top-p from the best to the worst, equals by
        their ids.
        """
        ...
