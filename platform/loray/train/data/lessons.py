"""What a teacher says of rows: of each target the tokens that it finds likeliest, with their log-probabilities.

A teacher is asked once for each row, before the first step, and its answers are kept in blocks
(`loray.train.data.kept`), from which workers read what a batch needs.

Shapes: T tokens of a row, N targets, K likeliest tokens; B rows of a batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from loray.errors import DataError, SpecError, StoreError
from loray.spec import TrainSpec
from loray.train.data.batches import IGNORED, BatchStream, MicroBatch, RowSource, TrainBatch, plan_evaluation
from loray.train.data.kept import Block, blocks_of, key_of, rows_of
from loray.train.data.shards import FolderCache

if TYPE_CHECKING:  # which has them
    from loray.train.data.rows import Dataset

TOP = np.dtype([("id", np.int32), ("log_prob", np.float32)])
Top = NDArray[Any]  # of TOP: a teacher's likeliest tokens, best first
_OPEN_BLOCKS = 32  # of a reader: each is one mapping and one file


# Of each row's T tokens, the (T − 1, K) likeliest ones in the place of each but the first, given those before it.
Answers = Callable[[Iterable[NDArray[np.int32]]], Iterator[Top]]
ASKING = "asking the teacher"


class Lessons:
    """A teacher's likeliest tokens for the targets of the rows that `planned` holds.

    planned    micro-batches as they are trained or measured
    named      all that the answers depend on beside the rows, as JSON
    num_top    K
    num_tokens of the base's vocabulary

    `missing` are blocks that nobody has asked about. It may be pickled.
    """

    def __init__(
        self,
        rows: RowSource,
        planned: Iterable[MicroBatch],
        named: Sequence[object],
        cache: FolderCache,
        *,
        num_top: int,
        num_tokens: int,
    ) -> None:
        self._cache, self._num_top, self._num_tokens = cache, num_top, num_tokens
        blocks = blocks_of(planned, len(rows.lengths))
        self._keys: list[str] = []
        self._ends: list[int] = []  # targets of each block
        self._block_R = np.full(len(rows.lengths), -1, np.int32)
        self._start_R, self._stop_R = (np.zeros(len(rows.lengths), np.int64) for _ in range(2))
        self.missing: list[int] = []
        self._blocks = [_numbers(block) for block in blocks]
        for i, (block, numbers) in enumerate(zip(blocks, self._blocks, strict=True)):
            at, read = 0, [rows.row(number) for number in numbers]
            for number, (_, targets) in zip(numbers, read, strict=True):
                num_targets = int(targets[1:].sum())
                if self._block_R[number] < 0:
                    self._block_R[number], self._start_R[number], self._stop_R[number] = i, at, at + num_targets
                at += num_targets
            self._keys.append(key_of(block, read, [num_top, *named]))
            self._ends.append(at)
            if not self._is_kept(i):
                self.missing.append(i)

    def num_rows(self, blocks: Sequence[int]) -> int:
        return sum(len(self._blocks[i]) for i in blocks)

    def ask(self, rows: RowSource, blocks: Sequence[int], answers: Answers) -> Iterator[int]:
        """Keep what a teacher says of blocks. Yields the number of rows of each. Raises DataError for other tokens."""
        for i in blocks:
            read = [rows.row(number) for number in self._blocks[i]]
            given = answers(ids for ids, _ in read)
            found = [top[targets[1:]] for (_, targets), top in zip(read, given, strict=True)]
            whole: Top = np.concatenate(found)
            if len(whole) and whole["id"].max() >= self._num_tokens:
                raise DataError("the teacher knows tokens that the base does not have: it must have the same tokenizer")
            self._cache.save(self._keys[i], whole)
            yield len(self._blocks[i])

    def joined(self, batch: TrainBatch) -> TrainBatch:
        """Give a batch of these rows what the teacher says of its targets."""
        learned_BT = batch.labels_BT != IGNORED
        ids_BTK = torch.zeros((*learned_BT.shape, self._num_top), dtype=torch.int32)
        log_probs_BTK = torch.zeros(ids_BTK.shape)
        if batch.num_targets:
            found: Top = np.concatenate([self._of(number) for number in rows_of(batch.rows)])
            ids_BTK[learned_BT] = torch.from_numpy(found["id"].copy())
            log_probs_BTK[learned_BT] = torch.from_numpy(found["log_prob"].copy())
        return batch._replace(teacher_ids_BTK=ids_BTK, teacher_log_probs_BTK=log_probs_BTK)

    def _of(self, number: int) -> Top:
        i = int(self._block_R[number])
        return _open(self._cache, self._keys[i])[self._start_R[number] : self._stop_R[number]]

    def _is_kept(self, i: int) -> bool:
        with suppress(OSError, ValueError, EOFError, StoreError):
            return self._cache.tokens(self._keys[i]).shape == (self._ends[i], self._num_top)
        return False


def lessons_of(
    spec: TrainSpec,
    data: Dataset,
    named: Sequence[object],
    num_top: int,
    num_tokens: int,
    *,
    stream: BatchStream | None = None,
) -> tuple[Lessons, Lessons]:
    """Make those of a run's training rows, as far as its steps meet them, and of its held-out rows. `stream`: the run's
    own, where there is one.

    Raises SpecError where the vocabulary has no tokens beside a teacher's `num_top`.
    """
    if num_top >= num_tokens:
        raise SpecError(f"objective.top_k is {num_top}, and the base has {num_tokens} tokens: lower it")
    stream, rows = stream or data.stream(spec), data.evaluation
    trained, measured = stream.planned(stream.steps_of(spec)), plan_evaluation(rows.lengths, spec.batch)
    of_tokens = {"num_top": num_top, "num_tokens": num_tokens}
    return (
        Lessons(data.train, trained, named, data.cache, **of_tokens),
        Lessons(rows, measured, named, data.cache, **of_tokens),
    )


def teach(
    lessons: tuple[Lessons, Lessons], data: Dataset, answers: Answers, *, rank: int = 0, size: int = 1
) -> Iterator[dict[str, Any]]:
    """Ask about all rows that nobody has asked about, or about a rank's share of their blocks. Yields how far it is, as
    the fields of an event.
    """
    sources = data.train, data.evaluation
    parts = [(each, rows, each.missing[rank::size]) for each, rows in zip(lessons, sources, strict=True)]
    total, done = sum(each.num_rows(blocks) for each, _, blocks in parts), 0
    began = time.perf_counter()
    yield {"stage": ASKING, "done": 0, "total": total}
    for each, rows, blocks in parts:
        for num_rows in each.ask(rows, blocks, answers):
            done += num_rows
            eta_s = (time.perf_counter() - began) / done * (total - done)
            yield {"stage": ASKING, "done": done, "total": total, "eta_s": eta_s}


@lru_cache(_OPEN_BLOCKS)
def _open(cache: FolderCache, key: str) -> Top:
    return cache.tokens(key)


def _numbers(block: Block) -> list[int]:
    return [number for batch in block for number in rows_of(batch)]
