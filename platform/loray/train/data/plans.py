"""Plans: which documents make the rows of an epoch and which rows its micro-batches, a function of (seed, epoch) alone.

A plan is four arrays, whatever the number of documents; only what is trained next becomes Python objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from loray.recipes.resolve import check_token_budget
from loray.spec import BatchSpec

_GROUP = 50  # micro-batches that `length_grouped` sorts by length together: their order stays random

Row = tuple[int, ...]  # documents of one row; several only where rows are packed
MicroBatch = tuple[Row, ...]
Indices = NDArray[np.int64]
PlanArray = NDArray[np.signedinteger[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class Plan(Sequence[MicroBatch]):
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
        rows = range(int(self.starts_B[index]), int(self.stops_B[index]))
        return tuple(self._row(r) for r in rows)

    def _row(self, r: int) -> Row:
        start = int(self.ends_R[r - 1]) if r else 0
        return tuple(self.documents_D[start : int(self.ends_R[r])].tolist())


def pair_lengths(lengths: Indices) -> Indices:
    """Tokens of each pair, padded to the longer answer. Rows 2i and 2i + 1 are a pair."""
    padded: Indices = 2 * lengths.reshape(-1, 2).max(1)
    return padded


class Share(NamedTuple):
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
    shares: Sequence[Share] = (),
) -> Plan:
    """Every document, or row of joined texts, once, or as often as `shares` say, in the order of this epoch. Raises
    SpecError where a row does not fit the token budget.
    """
    lengths_D = np.asarray(lengths, np.int64)
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(_drawn(shares, rng) if shares else len(lengths_D))
    check_token_budget(spec, int(lengths_D.max(initial=0)))
    if spec.order == "packed":
        rows_D = first_fit(lengths_D[order], max_length if spec.tokens is None else min(max_length, spec.tokens))
        return _filled(order[np.argsort(rows_D, kind="stable")], np.cumsum(np.bincount(rows_D)), lengths_D, spec)
    if spec.order == "length_grouped":
        group = _GROUP * max(1, _capacity(spec, int(lengths_D.max(initial=1))))
        order = order[np.lexsort((-lengths_D[order], np.arange(len(order)) // group))]
    plan = _filled(order, np.arange(1, len(order) + 1), lengths_D, spec)
    if spec.order == "length_grouped":
        batches = rng.permutation(len(plan))
        return Plan(plan.documents_D, plan.ends_R, plan.starts_B[batches], plan.stops_B[batches])
    return plan


def _drawn(shares: Sequence[Share], rng: np.random.Generator) -> Indices:
    """The rows of an epoch: of each source whole rounds, and another part of it every epoch."""
    drawn, first = [], 0
    for num_rows, weight in shares:
        count = max(1, round(num_rows * weight)) if num_rows else 0
        drawn.append(np.resize(first + rng.permutation(num_rows), count))
        first += num_rows
    return np.concatenate(drawn)


def plan_evaluation(lengths: Sequence[int] | Indices, spec: BatchSpec) -> Plan:
    """Every row once, the longest first, in micro-batches of the size of training's: little padding, equal memory."""
    lengths_D = np.asarray(lengths, np.int64)
    longest = int(lengths_D.max(initial=0))
    if spec.tokens is not None and longest > spec.tokens:
        spec = spec.model_copy(update={"tokens": longest})
    order = np.argsort(-lengths_D, kind="stable")
    return _filled(order, np.arange(1, len(order) + 1), lengths_D, spec)


def first_fit(lengths_D: Indices, max_length: int) -> Indices:
    """The row of each document, of rows of up to `max_length` tokens: the first one with room. O(D log D), with a tree
    of some 20 bytes a document.
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


def _filled(documents_D: Indices, ends_R: Indices, lengths: Indices, spec: BatchSpec) -> Plan:
    """Rows, one after the other, in as few micro-batches as hold them in this order."""
    num_rows = len(ends_R)
    if spec.rows is not None:
        stops = np.minimum(np.arange(spec.rows, num_rows + spec.rows, spec.rows), num_rows)
    else:
        stops = _within_budget(np.diff(np.cumsum(lengths[documents_D])[ends_R - 1], prepend=0), spec)
    return Plan(documents_D, ends_R, np.concatenate([[0], stops])[:-1].astype(np.int64), stops)


def _within_budget(lengths_R: Indices, spec: BatchSpec) -> Indices:
    stops, first, longest = list[int](), 0, 0
    for r, length in enumerate(lengths_R.tolist()):
        longest = max(longest, length)
        if r > first and r - first + 1 > _capacity(spec, longest):
            stops.append(r)
            first, longest = r, length
    return np.array([*stops, len(lengths_R)] if len(lengths_R) else [], np.int64)
