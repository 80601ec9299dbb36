"""Plans of epochs, their micro-batches as tensors, and a cursor into the plan.

A plan says which documents make the rows of an epoch and which rows its micro-batches, a function of (seed, epoch)
alone. It is four arrays; only what is trained next becomes Python objects. An epoch of more than a million documents is
planned a million at a time, so that a process never holds more.

Shapes: B rows, T positions; R rows and D documents of a plan. Padding is on the right.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loray.recipes.resolve import check_token_budget
from loray.spec import BatchSpec, TrainSpec


class RowSource(Protocol):
    """Rows of tokens. `desirable`: of answers that are no pairs, which of them are, by rows of a plan."""

    @property
    def lengths(self) -> NDArray[np.int64]: ...
    @property
    def desirable(self) -> NDArray[np.bool_] | None: ...

    def row(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Read the token ids of row i, and which of them are targets."""

    def let_go(self) -> None:
        """Give back memory that holds what is read from files of rows, which is read again where it is needed."""


@dataclass(frozen=True, slots=True)
class TokenizedRows:
    """Row i is [starts[i], starts[i] + lengths[i]) of N tokens. Some of them may belong to no row."""

    ids_N: NDArray[np.int32]
    targets_N: NDArray[np.bool_]
    starts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    desirable: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        return len(self.starts)

    def row(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        part = slice(self.starts[i], self.starts[i] + self.lengths[i])
        return self.ids_N[part], self.targets_N[part]

    def let_go(self) -> None:
        """Give nothing back: there are no files."""


def pack_rows(rows: Sequence[tuple[Any, Any]], desirable: NDArray[np.bool_] | None = None) -> TokenizedRows:
    """Make TokenizedRows of (ids, targets) pairs. The first token of a row is never a target."""
    lengths = np.array([len(ids) for ids, _ in rows], np.int64)
    starts = np.cumsum(lengths) - lengths
    ids_N = np.concatenate([np.asarray(ids, np.int32) for ids, _ in rows]) if rows else np.empty(0, np.int32)
    targets_N = np.concatenate([np.asarray(t, np.bool_) for _, t in rows]) if rows else np.empty(0, np.bool_)
    targets_N[starts] = False
    return TokenizedRows(ids_N, targets_N, starts, lengths, desirable)


@dataclass(frozen=True, slots=True)
class UnpairedRows:
    """Answers that are no pairs, as rows of two sequences: 2i is row i of `answers`, and 2i + 1 is its prompt with the
    answer of the row before it; the first one has that of the last.

    prompts  tokens of each row before its answer
    lengths  of all sequences, which are cut off at the same length as those of `answers`
    """

    answers: RowSource
    prompts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    desirable: NDArray[np.bool_]

    @classmethod
    def of(
        cls, answers: RowSource, num_targets: NDArray[np.int64], desirable: NDArray[np.bool_], max_length: int
    ) -> UnpairedRows:
        """`num_targets` are the last tokens of each row: its answer."""
        prompts = answers.lengths - num_targets
        unrelated = np.minimum(prompts + np.roll(num_targets, 1), max_length)
        return cls(answers, prompts, np.stack([answers.lengths, unrelated], axis=1).ravel(), desirable)

    def __len__(self) -> int:
        return len(self.lengths)

    def row(self, i: int) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        ids, targets = self.answers.row(i // 2)
        if i % 2 == 0:
            return ids, targets
        before = (i // 2 - 1) % len(self.prompts)
        prompt, answer = self.prompts[i // 2], self.answers.row(before)[0][self.prompts[before] :]
        ids = np.concatenate([ids[:prompt], answer])[: self.lengths[i]]
        return ids, np.arange(len(ids)) >= prompt

    def let_go(self) -> None:
        self.answers.let_go()


# -- plans ------------------------------------------------------------------------------------------------------------

_GROUP = 50  # micro-batches that `length_grouped` sorts by length together: their order stays random

PlannedRow = tuple[int, ...]  # documents of one row; several only where rows are packed
MicroBatch = tuple[PlannedRow, ...]
Indices = NDArray[np.int64]
PlanArray = NDArray[np.signedinteger[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class EpochPlan(Sequence[MicroBatch]):
    """Micro-batch b is the rows [starts_B[b], stops_B[b]), row r the documents from ends_R[r − 1] to ends_R[r] of D."""

    documents_D: PlanArray
    ends_R: PlanArray
    starts_B: PlanArray
    stops_B: PlanArray

    def __len__(self) -> int:
        return len(self.starts_B)

    @overload
    def __getitem__(self, index: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, index: slice) -> list[MicroBatch]: ...
    def __getitem__(self, index: int | slice) -> MicroBatch | list[MicroBatch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        first, stop = int(self.starts_B[index]), int(self.stops_B[index])
        begin, ends_R = int(self.ends_R[first - 1]) if first else 0, self.ends_R[first:stop]
        rows = np.split(self.documents_D[begin : ends_R[-1]], ends_R[:-1] - begin)
        return tuple(tuple(row.tolist()) for row in rows)


def pair_lengths(lengths: Indices) -> Indices:
    """Count the tokens of each pair, padded to the longer answer. Rows 2i and 2i + 1 are a pair."""
    padded: Indices = 2 * lengths.reshape(-1, 2).max(1)
    return padded


class SourceShare(NamedTuple):
    """The next `num_rows` rows, of one source, are `weight` times in an epoch."""

    num_rows: int
    weight: float


def plan_epoch(
    lengths: Sequence[int] | Indices,
    spec: BatchSpec,
    *,
    max_length: int,
    seed: int,
    epoch: int,
    shares: Sequence[SourceShare] = (),
) -> EpochPlan:
    """Plan every document, or row of joined texts, once, or as often as `shares` say, in the order of this epoch.

    Raises SpecError where a row does not fit the token budget.
    """
    lengths_D = np.asarray(lengths, np.int64)
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(_drawn(shares, rng) if shares else len(lengths_D))
    return _arranged(order, lengths_D[order], spec, max_length, int(lengths_D.max(initial=0)), rng)


def _arranged(
    order: Indices, lengths_D: Indices, spec: BatchSpec, max_length: int, longest: int, rng: np.random.Generator
) -> EpochPlan:
    """Documents in the order in which they were drawn, with their lengths, as rows and micro-batches."""
    check_token_budget(spec, longest)
    if spec.order == "packed":
        rows_D = first_fit(lengths_D, max_length if spec.tokens is None else min(max_length, spec.tokens))
        by_row = np.argsort(rows_D, kind="stable")
        return _filled(order[by_row], np.cumsum(np.bincount(rows_D)), lengths_D[by_row], spec)
    if spec.order == "length_grouped":
        group = _GROUP * max(1, _capacity(spec, max(longest, 1)))
        by_length = np.lexsort((-lengths_D, np.arange(len(order)) // group))
        order, lengths_D = order[by_length], lengths_D[by_length]
    plan = _filled(order, np.arange(1, len(order) + 1), lengths_D, spec)
    if spec.order == "length_grouped":
        batches = rng.permutation(len(plan))
        return EpochPlan(plan.documents_D, plan.ends_R, plan.starts_B[batches], plan.stops_B[batches])
    return plan


def _drawn(shares: Sequence[SourceShare], rng: np.random.Generator) -> Indices:
    """The rows of an epoch: of each source whole rounds, and another part of it every epoch."""
    drawn, first = [], 0
    for num_rows, weight in shares:
        count = max(1, round(num_rows * weight)) if num_rows else 0
        drawn.append(np.resize(first + rng.permutation(num_rows), count))
        first += num_rows
    return np.concatenate(drawn)


def plan_evaluation(lengths: Sequence[int] | Indices, spec: BatchSpec) -> EpochPlan:
    """Plan every row once, the longest first, in micro-batches of training's size: little padding, equal memory."""
    lengths_D = np.asarray(lengths, np.int64)
    longest = int(lengths_D.max(initial=0))
    if spec.tokens is not None and longest > spec.tokens:
        spec = spec.model_copy(update={"tokens": longest})
    order = np.argsort(-lengths_D, kind="stable")
    return _filled(order, np.arange(1, len(order) + 1), lengths_D[order], spec)


def first_fit(lengths_D: Indices, max_length: int) -> Indices:
    """Find the row of each document, of rows of up to `max_length` tokens: the first one with room. O(D log D), with a
    tree of some 20 bytes a document.
    """
    size = 1 << max(0, (len(lengths_D) - 1).bit_length())
    room = [max_length] * (2 * size)  # free tokens; room[1] is the maximum over rows, leaves start at `size`
    rows_D = np.empty(len(lengths_D), np.int64)
    rows = rows_D.data
    for document, length in enumerate(np.ascontiguousarray(lengths_D, np.int64).data):
        node = 1
        while node < size:
            node = 2 * node if room[2 * node] >= length else 2 * node + 1
        rows[document] = node - size
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows_D


def _capacity(spec: BatchSpec, longest: int) -> int:
    """Number of rows of up to `longest` tokens that fit into one micro-batch."""
    if spec.rows is not None:
        return spec.rows
    assert spec.tokens is not None
    return spec.tokens // longest


def _filled(documents_D: Indices, ends_R: Indices, lengths_D: Indices, spec: BatchSpec) -> EpochPlan:
    """Rows, one after the other, in as few micro-batches as hold them in this order."""
    num_rows = len(ends_R)
    if spec.rows is not None:
        stops = np.minimum(np.arange(spec.rows, num_rows + spec.rows, spec.rows), num_rows)
    else:
        stops = _within_budget(np.diff(np.cumsum(lengths_D)[ends_R - 1], prepend=0), spec)
    return EpochPlan(documents_D, ends_R, np.concatenate([[0], stops])[:-1].astype(np.int64), stops)


def _within_budget(lengths_R: Indices, spec: BatchSpec) -> Indices:
    stops, first, longest = list[int](), 0, 0
    for r, length in enumerate(lengths_R.tolist()):
        longest = max(longest, length)
        if r > first and r - first + 1 > _capacity(spec, longest):
            stops.append(r)
            first, longest = r, length
    return np.array([*stops, len(lengths_R)] if len(lengths_R) else [], np.int64)


# -- plans of long epochs ---------------------------------------------------------------------------------------------

_STRIP = 1 << 12  # neighbouring rows that are drawn together
_STRIPS = 1 << 8  # of a block

ShareOut = Callable[[Callable[[int], int], int], Sequence[int]]  # (function, n) → function of 0 to n − 1


def compute_here(function: Callable[[int], int], num: int) -> Sequence[int]:
    """Compute a function of 0 to num − 1, as `ShareOut`, on this rank alone."""
    return [function(k) for k in range(num)]


class LongPlan(Sequence[MicroBatch]):
    """An epoch of so many rows that it is planned block by block, when each is reached.

    The order is drawn in two steps: strips of neighbouring rows are shuffled, and then the rows of each block of
    strips. So a block reads a few places of the files of rows and of tokens, and no rank holds a number for each row.
    What a block holds is arranged as an epoch is.
    """

    def __init__(
        self,
        rows: RowSource,
        spec: BatchSpec,
        *,
        max_length: int,
        seed: int,
        epoch: int,
        shares: Sequence[SourceShare] = (),
        paired: bool = False,
        share_out: ShareOut = compute_here,
    ) -> None:
        """`shares` and `paired` are those of BatchStream. `share_out` counts the micro-batches of all blocks; it is a
        collective call where it computes on several ranks.
        """
        self._rows, self._spec, self._max_length, self._seed = rows, spec, max_length, (seed, epoch)
        self._each = 2 if paired else 1
        begins, sizes, of_strips, first = [], [], [], 0
        for num_rows, weight in shares or [SourceShare(len(rows.lengths) // self._each, 1.0)]:
            begins.append(np.arange(first, first + num_rows, _STRIP, dtype=np.int64))
            sizes.append(np.minimum(first + num_rows - begins[-1], _STRIP))
            of_strips.append(SourceShare(len(begins[-1]), weight))
            first += num_rows
        rng = np.random.default_rng(self._seed)
        order = rng.permutation(_drawn(of_strips, rng))
        self._begins_S, self._sizes_S = np.concatenate(begins)[order], np.concatenate(sizes)[order]
        num_blocks = -(-len(order) // _STRIPS)
        self._ends_K = np.cumsum(share_out(self._size, num_blocks))
        self._at = -1
        self._block: Sequence[MicroBatch] = ()

    def __len__(self) -> int:
        return int(self._ends_K[-1])

    @overload
    def __getitem__(self, index: int) -> MicroBatch: ...
    @overload
    def __getitem__(self, index: slice) -> list[MicroBatch]: ...
    def __getitem__(self, index: int | slice) -> MicroBatch | list[MicroBatch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        k = int(np.searchsorted(self._ends_K, index, side="right"))
        if k != self._at:
            self._at, self._block = k, self._planned(k)
        return self._block[index - (int(self._ends_K[k - 1]) if k else 0)]

    def _size(self, k: int) -> int:
        """Count the micro-batches of a block; where lengths do not matter, without a look at them."""
        if self._spec.rows is None or self._spec.order == "packed":
            return len(self._planned(k))
        return -(-int(self._sizes_S[_block_of(k)].sum()) // self._spec.rows)

    def _planned(self, k: int) -> EpochPlan:
        begins, sizes = self._begins_S[_block_of(k)], self._sizes_S[_block_of(k)]
        rows_D = np.repeat(begins - np.cumsum(sizes) + sizes, sizes) + np.arange(sizes.sum())
        strips = zip(begins.tolist(), sizes.tolist(), strict=True)
        lengths_D = np.concatenate([self._lengths(*strip) for strip in strips])
        rng = np.random.default_rng([*self._seed, k + 1])
        drawn = rng.permutation(len(rows_D))
        longest = int(lengths_D.max(initial=0))
        return _arranged(rows_D[drawn], lengths_D[drawn], self._spec, self._max_length, longest, rng)

    def _lengths(self, begin: int, size: int) -> Indices:
        found = np.array(self._rows.lengths[self._each * begin : self._each * (begin + size)])
        self._rows.let_go()
        return pair_lengths(found) if self._each == 2 else found


def _block_of(k: int) -> slice:
    return slice(k * _STRIPS, (k + 1) * _STRIPS)


# -- micro-batches ----------------------------------------------------------------------------------------------------

IGNORED = -100


class Cursor(NamedTuple):
    """All ranks together have trained on `done` micro-batches of `epoch`."""

    epoch: int = 0
    done: int = 0


FIRST = Cursor()


class TrainBatch(NamedTuple):
    """One micro-batch.

    labels_BT is shifted: labels_BT[b, t] is the token that the hidden state at t predicts, −100 where there is no
    target. So no document of a packed row predicts the first token of the next.
    document_ids_BT counts the documents of a row from 0, −1 on padding; None where each row is one whole document.
    position_ids_BT restarts at each document of a packed row, and at its padding; None where rows are not packed.
    rows: the data's rows that each row holds.
    reference_B: of pairs, the log-probability of each answer before the first step; None: it is to be computed.
    following_BT: of pairs, the token after each, in prompts too, −100 where a row ends.
    desirable_P: of answers that are no pairs: whether the first sequence of each row is desirable.
    teacher_ids_BTK, teacher_log_probs_BTK: where there is a label, the K tokens that a teacher finds likeliest.
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    document_ids_BT: Tensor | None
    position_ids_BT: Tensor | None
    num_tokens: int
    num_targets: int
    num_pairs: int = 0  # of answers: first the rows of all chosen ones, then those of the rejected ones
    rows: MicroBatch = ()
    reference_B: Tensor | None = None
    following_BT: Tensor | None = None
    desirable_P: Tensor | None = None
    teacher_ids_BTK: Tensor | None = None
    teacher_log_probs_BTK: Tensor | None = None

    def model_inputs(self, device: torch.device) -> dict[str, Tensor]:
        """Make what a transformers model takes, which finds packing by positions, and only where there is no mask."""
        inputs = {"input_ids": self.input_ids_BT.to(device)}
        if self.position_ids_BT is not None:
            inputs["position_ids"] = self.position_ids_BT.to(device)
        elif self.document_ids_BT is not None:
            inputs["attention_mask"] = (self.document_ids_BT >= 0).long().to(device)
        return inputs


def collate(rows: RowSource, batch: MicroBatch, *, packed: bool) -> TrainBatch:
    """Make the tensors of a micro-batch."""
    read = [[rows.row(document) for document in row] for row in batch]
    lengths = [sum(len(ids) for ids, _ in row) for row in read]
    shape = (len(batch), max(lengths))
    input_ids_BT = torch.zeros(shape, dtype=torch.long)
    labels_BT = torch.full(shape, IGNORED, dtype=torch.long)
    document_ids_BT = torch.full(shape, -1)
    position_ids_BT = torch.zeros(shape, dtype=torch.long)
    for b, row in enumerate(read):
        at = 0
        for number, (ids, targets) in enumerate(row):
            here = torch.from_numpy(ids.astype(np.int64))
            end = at + len(ids)
            input_ids_BT[b, at:end] = here
            labels_BT[b, at : end - 1] = torch.where(torch.from_numpy(targets[1:].copy()), here[1:], IGNORED)
            document_ids_BT[b, at:end] = number
            position_ids_BT[b, at:end] = torch.arange(len(ids))
            at = end
        position_ids_BT[b, at:] = torch.arange(shape[1] - at)  # the padding of a packed row is another document
    return TrainBatch(
        input_ids_BT,
        labels_BT,
        document_ids_BT if packed or min(lengths) < shape[1] else None,
        position_ids_BT if packed else None,
        num_tokens=sum(lengths),
        num_targets=int((labels_BT != IGNORED).sum()),
        rows=batch,
    )


def collate_pairs(rows: RowSource, batch: MicroBatch) -> TrainBatch:
    """Make a batch of twice as many rows of the pairs of `batch`, each a row of a plan."""
    pairs = [pair for (pair,) in batch]
    made = collate(rows, tuple((2 * pair + side,) for side in (0, 1) for pair in pairs), packed=False)
    next_ids_BT = made.input_ids_BT.roll(-1, 1)
    next_ids_BT[:, -1] = IGNORED
    if made.document_ids_BT is not None:
        next_ids_BT[made.document_ids_BT.roll(-1, 1) < 0] = IGNORED
    desirable_P = None if rows.desirable is None else torch.from_numpy(rows.desirable[pairs])
    return made._replace(num_pairs=len(pairs), following_BT=next_ids_BT, desirable_P=desirable_P)


class BatchStream:
    """An endless sequence of micro-batches over epochs. A step takes `per_step` of them, over all data ranks.

    All ranks follow the same plan, and each takes every `size`-th micro-batch, so that the batch of a step does not
    depend on the number of ranks. Strategies need equally many micro-batches on every rank: a rank with one less adds
    one without labels. `paired`: rows 2i and 2i + 1 are a pair, which the plan has as one row. `share_out` counts
    a long epoch, on all ranks together. Not thread-safe.
    """

    def __init__(
        self,
        rows: RowSource,
        spec: BatchSpec,
        *,
        max_length: int,
        seed: int,
        per_step: int,
        cursor: Cursor = FIRST,
        rank: int = 0,
        size: int = 1,
        shares: Sequence[SourceShare] = (),
        paired: bool = False,
        share_out: ShareOut = compute_here,
    ) -> None:
        self._rows, self._spec, self._paired = rows, spec, paired
        self._per_step, self._rank, self._size = per_step, rank, size
        options: dict[str, Any] = {"max_length": max_length, "seed": seed, "shares": shares}
        self._plan_of: Callable[..., Sequence[MicroBatch]]
        if len(rows.lengths) // (2 if paired else 1) > _STRIP * _STRIPS:
            self._plan_of = partial(LongPlan, rows, spec, paired=paired, share_out=share_out, **options)
        else:
            lengths = pair_lengths(rows.lengths) if paired else rows.lengths
            self._plan_of = partial(plan_epoch, lengths, spec, **options)
        self.cursor = cursor
        self._plan: Sequence[MicroBatch] = self._plan_of(epoch=cursor.epoch)

    def next_step(self) -> list[TrainBatch]:
        """Make this rank's micro-batches of the next optimizer step."""
        planned = [self._next() for _ in range(self._per_step)]
        mine = [self._collate(batch) for batch in planned[self._rank :: self._size]]
        if len(mine) < math.ceil(self._per_step / self._size):
            mine.append(_without_labels(self._collate(planned[-1])))
        return mine

    def _collate(self, batch: MicroBatch) -> TrainBatch:
        if self._paired:
            return collate_pairs(self._rows, batch)
        return collate(self._rows, batch, packed=self._spec.order == "packed")

    def _next(self) -> MicroBatch:
        if self.cursor.done == len(self._plan):
            self.cursor = Cursor(self.cursor.epoch + 1, 0)
            self._plan = self._plan_of(epoch=self.cursor.epoch)
        self.cursor = Cursor(self.cursor.epoch, self.cursor.done + 1)
        return self._plan[self.cursor.done - 1]

    def planned(self, num_steps: int) -> Iterator[MicroBatch]:
        """Plan the micro-batches of all ranks from the first epoch on, up to the end of step `num_steps`."""
        left, epoch = num_steps * self._per_step, 0
        while left > 0:
            plan = self._plan if epoch == self.cursor.epoch else self._plan_of(epoch=epoch)
            yield from itertools.islice(plan, left)
            left, epoch = left - len(plan), epoch + 1

    def steps_of(self, spec: TrainSpec) -> int:
        """Count the steps of a run."""
        return spec.max_steps or self.num_steps(spec.num_epochs or 1.0)

    def num_steps(self, num_epochs: float) -> int:
        """Count the steps that cover `num_epochs`. The last one may include micro-batches of the next epoch."""
        whole, part = int(num_epochs), num_epochs - int(num_epochs)
        count = float(sum(self._size_of(epoch) for epoch in range(whole)))
        if part:
            count += part * self._size_of(whole)
        return max(1, math.ceil(count / self._per_step - 1e-9))

    def _size_of(self, epoch: int) -> int:
        return len(self._plan if epoch == self.cursor.epoch else self._plan_of(epoch=epoch))


def _without_labels(batch: TrainBatch) -> TrainBatch:
    labels_BT = torch.full_like(batch.labels_BT, IGNORED)
    following_BT = None if batch.following_BT is None else labels_BT
    return batch._replace(labels_BT=labels_BT, following_BT=following_BT, num_tokens=0, num_targets=0, num_pairs=0)
