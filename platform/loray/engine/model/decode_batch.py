"""Steps of one token a request, for captured graphs.

The block tables of running requests stay on the device, one row for each slot, and so do the descriptors of adapters. A
step sends what has changed: tokens, positions, new blocks. Its order, its slots and its adapters are arranged again
only when other requests run than in the step before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import is_

import numpy as np
import numpy.typing as npt

from loray.engine.pool.pool import ResidentAdapter
from loray.engine.request import Chunk, Request, RequestState
from loray_kernels import ITEM_TOKENS, DecodeStep, Parts

_NONE = np.array([], dtype=np.int64)
_MOST_TURNS = 3  # of captured steps before one of requests that are apart

Resident = Callable[[Chunk], ResidentAdapter | None]


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """`sampled` in the order of the step's rows; `residents` are distinct."""

    step: DecodeStep
    sampled: tuple[Chunk, ...]
    residents: tuple[ResidentAdapter, ...]
    scored: tuple[()] = ()
    pooled: tuple[()] = ()

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        return self.sampled


@dataclass(slots=True)
class _Arranged:
    """The last step's arrangement. By row: `order` has its chunk's place, `slots` its slot, `prompts_S` its tokens of
    prompt, `embeddings` its adapter if that has embedding rows; empty: none has. `apart`: places of chunks without row.
    """

    requests: list[Request]
    blocks: list[list[int]]
    order: list[int]
    apart: list[int]
    slots: list[int]
    slots_S: npt.NDArray[np.int64]
    prompts_S: npt.NDArray[np.int64]
    items: npt.NDArray[np.int64]
    residents: tuple[ResidentAdapter, ...]
    parts: Parts
    vectors_S: npt.NDArray[np.int64]
    pairs: npt.NDArray[np.int64]
    embeddings: list[ResidentAdapter | None]


class DecodeSteps:
    """Makes the batches of one backend's captured steps, and knows what its block tables hold."""

    def __init__(self, *, num_slots: int, max_blocks: int, max_rows: int) -> None:
        self._max_blocks, self._max_rows = max_blocks, max_rows
        self._free = list(range(num_slots))[::-1]
        self._slot_of: dict[Request, int] = {}
        self._blocks: list[list[int]]  # by slot: the request's own list, which only grows, and
        self._lengths: list[int]  # how many of it are in the table
        self._last: _Arranged | None
        self._num_captured = 0  # steps since one of requests that are apart
        self.forget()

    def forget(self) -> None:
        """Forget what the tables hold: a step has failed, and perhaps before its blocks were sent."""
        num_slots = len(self._free) + len(self._slot_of)
        self._blocks, self._lengths, self._last = [[]] * num_slots, [0] * num_slots, None

    def batch(self, chunks: Sequence[Chunk], resident: Resident) -> DecodeBatch | Sequence[Chunk]:
        """Make a step of those of `chunks` that a captured step can take; else return the chunks of the next step.

        These are all of them if the step is of another kind, or has embedding rows of tokens that are in flight: which
        row a token has is known here alone.

        Requests whose adapter has no descriptor, or with more blocks than a table has, are apart: they and the others
        have steps of their own by turns.
        """
        arranged = self._arranged(chunks, resident)
        if arranged is None:
            return chunks
        if arranged.apart and self._num_captured >= _turns(len(arranged.order), len(arranged.apart)):
            self._num_captured = 0
            return [chunks[i] for i in arranged.apart]
        in_order = tuple([chunks[i] for i in arranged.order])
        if arranged.embeddings and any(chunk.request.num_in_flight for chunk in in_order):
            return chunks
        requests = [chunk.request for chunk in in_order]
        positions_S = np.array([chunk.start for chunk in in_order], dtype=np.int64)
        num_outputs_S = np.array([len(r.output_ids) + r.num_in_flight for r in requests], dtype=np.int64)
        # Of requests whose tokens are all known: a constraint may have forced some, or a preempted one starts again.
        if not (num_outputs_S.all() and (positions_S + 1 == arranged.prompts_S + num_outputs_S).all()):
            self._last = None
            return chunks
        if any(len(request.blocks) > self._max_blocks for request in requests):
            self._last = None
            return self.batch(chunks, resident)
        self._num_captured += 1
        places: list[int] = []
        blocks: list[int] = []
        for request, slot in zip(requests, arranged.slots, strict=True):
            own, known, first = request.blocks, self._lengths[slot], slot * self._max_blocks
            if own is not self._blocks[slot]:  # the request has come, or some of its blocks are others now
                sent, self._blocks[slot] = self._blocks[slot], own
                known = min(known, len(own))
                changed = [i for i in range(known) if own[i] != sent[i]]
                places += [first + i for i in changed]
                blocks += [own[i] for i in changed]
            if len(own) != known:
                places += range(first + known, first + len(own))
                blocks += own[known:]
            self._lengths[slot] = len(own)
        token_ids_S = np.array([-1 if r.num_in_flight else r.output_ids[-1] for r in requests], dtype=np.int64)
        own_rows_S = _NONE
        if arranged.embeddings:
            tokens = zip(arranged.embeddings, token_ids_S.tolist(), strict=True)
            own_rows_S = np.array([-1 if a is None else a.token_row.get(t, -1) for a, t in tokens], dtype=np.int64)
        step = DecodeStep(
            token_ids_S,
            positions_S,
            arranged.slots_S,
            arranged.items,
            places,
            blocks,
            arranged.parts,
            arranged.vectors_S,
            arranged.pairs,
            own_rows_S,
        )
        return DecodeBatch(step, in_order, arranged.residents)

    def _arranged(self, chunks: Sequence[Chunk], resident: Resident) -> _Arranged | None:
        if len(chunks) > self._max_rows or any(chunk.num_tokens != 1 for chunk in chunks):
            self._last = None
            return None
        requests = [chunk.request for chunk in chunks]
        last = self._last
        # A request that was preempted and came back has a new list of blocks, and perhaps its adapter a new place.
        if last is None or last.requests != requests or not all(map(is_, last.blocks, [r.blocks for r in requests])):
            last = self._last = self._arrange(chunks, requests, resident)
        return last

    def _arrange(self, chunks: Sequence[Chunk], requests: list[Request], resident: Resident) -> _Arranged | None:
        adapters = [resident(chunk) for chunk in chunks]
        has_row = [
            (a is None or a.descriptor is not None) and len(request.blocks) <= self._max_blocks
            for a, request in zip(adapters, requests, strict=True)
        ]
        if not any(has_row):
            return None
        places = [_place(a) for a in adapters]
        order = sorted((i for i, has in enumerate(has_row) if has), key=places.__getitem__)
        in_order = [adapters[i] for i in order]
        descriptors = [None if a is None else a.descriptor for a in in_order]
        parts = Parts.NONE
        for descriptor in {*descriptors} - {None}:
            assert descriptor is not None
            parts |= descriptor.parts
        has_vectors = bool(parts & ~Parts.LORA)
        has_rows = [a if a is not None and a.token_row else None for a in in_order]
        slots = self._slots_of([requests[i] for i in order])
        return _Arranged(
            requests,
            [request.blocks for request in requests],
            order,
            [i for i, has in enumerate(has_row) if not has],
            slots,
            np.array(slots, dtype=np.int64),
            np.array([requests[i].num_prompt_tokens for i in order], dtype=np.int64),
            _items([None if r is None else r.lora for r in descriptors], [places[i] for i in order]),
            tuple({id(a): a for a in adapters if a is not None}.values()),
            parts,
            np.array([0 if r is None else r.vectors for r in descriptors], dtype=np.int64) if has_vectors else _NONE,
            _items([None if r is None else r.pair for r in descriptors], [places[i][0] for i in order]),
            has_rows if any(a is not None for a in has_rows) else [],
        )

    def _slots_of(self, requests: Sequence[Request]) -> list[int]:
        """Give requests their slots; those that run no more give theirs back."""
        for request in [r for r in self._slot_of if r.state is not RequestState.RUNNING]:
            slot = self._slot_of.pop(request)
            self._blocks[slot], self._lengths[slot] = [], 0
            self._free.append(slot)
        for request in requests:
            if request not in self._slot_of:
                self._slot_of[request] = self._free.pop()
        return [self._slot_of[request] for request in requests]


def _turns(num_captured: int, num_apart: int) -> int:
    """Count the captured steps that go before one of requests that are apart, which takes about as long: one to three,
    by how many requests there are of both. So neither waits for more than three steps of the others.
    """
    return max(1, min(_MOST_TURNS, num_captured // num_apart))


def _place(adapter: ResidentAdapter | None) -> tuple[int, int]:
    """The key by which rows are ordered: those of a pair are neighbours, and in it those of an adapter."""
    if adapter is None or adapter.descriptor is None:
        return -1, -1
    return -1 if adapter.pair is None else adapter.pair.first_block, adapter.descriptor.start


def _items(starts: Sequence[int | None], owners: Sequence[object]) -> npt.NDArray[np.int64]:
    """(start, first row, rows up to ITEM_TOKENS) for rows that follow each other and have one owner; `starts` by row,
    None: it has no item.
    """
    items: list[int] = []
    row = 0
    for _, stretch in groupby(owners):
        num, start = len(list(stretch)), starts[row]
        if start is not None:
            for first in range(row, row + num, ITEM_TOKENS):
                items += (start, first, min(ITEM_TOKENS, row + num - first))
        row += num
    return np.array(items, dtype=np.int64)
