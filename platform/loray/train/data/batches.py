"""Batches: the micro-batches of an epoch's plan as tensors, and a cursor into the plan.

Shapes: B rows, T positions. Padding is on the right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loray.spec import BatchSpec
from loray.train.data.examples import Rows
from loray.train.data.kept_plans import kept_plan
from loray.train.data.plans import MicroBatch, Plan, Share
from loray.train.data.shards import ShardCache

IGNORED = -100


class Cursor(NamedTuple):
    """All ranks together have trained on `done` micro-batches of `epoch`."""

    epoch: int = 0
    done: int = 0


_START = Cursor()


class Batch(NamedTuple):
    """One micro-batch.

    labels_BT is shifted: labels_BT[b, t] is the token that the hidden state at t predicts, −100 where there is no
    target. So no document of a packed row predicts the first token of the next.
    attention_mask_BT is 1 on tokens and 0 on padding, None where rows are packed or nothing is padded.
    position_ids_BT restarts at each document of a packed row, and at its padding; None where rows are not packed.
    """

    input_ids_BT: Tensor
    labels_BT: Tensor
    attention_mask_BT: Tensor | None
    position_ids_BT: Tensor | None
    num_tokens: int
    num_targets: int
    num_pairs: int | None = None  # of answers: first the rows of all chosen ones, then those of the rejected ones

    @property
    def num_terms(self) -> int:
        """Terms of the loss, of which a step takes the mean: labels, or pairs."""
        return self.num_targets if self.num_pairs is None else self.num_pairs

    def model_inputs(self, device: torch.device) -> dict[str, Tensor]:
        named = {
            "input_ids": self.input_ids_BT,
            "attention_mask": self.attention_mask_BT,
            "position_ids": self.position_ids_BT,
        }
        return {name: tensor.to(device) for name, tensor in named.items() if tensor is not None}


def collate(rows: Rows, batch: MicroBatch, *, packed: bool) -> Batch:
    lengths = [sum(int(rows.lengths[i]) for i in row) for row in batch]
    shape = (len(batch), max(lengths))
    input_ids_BT = torch.zeros(shape, dtype=torch.long)
    labels_BT = torch.full(shape, IGNORED, dtype=torch.long)
    position_ids_BT = torch.zeros(shape, dtype=torch.long)
    for b, row in enumerate(batch):
        at = 0
        for document in row:
            ids, targets = rows.row(document)
            here = torch.from_numpy(ids.astype(np.int64))
            end = at + len(ids)
            input_ids_BT[b, at:end] = here
            labels_BT[b, at : end - 1] = torch.where(torch.from_numpy(targets[1:].copy()), here[1:], IGNORED)
            position_ids_BT[b, at:end] = torch.arange(len(ids))
            at = end
        position_ids_BT[b, at:] = torch.arange(shape[1] - at)  # the padding of a packed row is another document
    attention_mask_BT = None
    if not packed and min(lengths) < shape[1]:
        attention_mask_BT = (torch.arange(shape[1])[None] < torch.tensor(lengths)[:, None]).long()
    return Batch(
        input_ids_BT,
        labels_BT,
        attention_mask_BT,
        position_ids_BT if packed else None,
        num_tokens=sum(lengths),
        num_targets=int((labels_BT != IGNORED).sum()),
    )


def collate_pairs(rows: Rows, batch: MicroBatch) -> Batch:
    """The pairs of `batch`, each a row of a plan, as a batch of twice as many rows."""
    pairs = [pair for (pair,) in batch]
    return collate(rows, tuple((2 * pair + side,) for side in (0, 1) for pair in pairs), packed=False)._replace(
        num_pairs=len(pairs)
    )


class BatchStream:
    """An endless sequence of micro-batches over epochs. A step takes `per_step` of them, over all data ranks.

    All ranks follow the same plan, and each takes every `size`-th micro-batch, so that the batch of a step does not
    depend on the number of ranks. Strategies need equally many micro-batches on every rank: a rank with one less adds
    one without labels. `paired`: rows 2i and 2i + 1 are a pair, which the plan has as one row. `cache` has the plans of
    many rows. Not thread-safe.
    """

    def __init__(
        self,
        rows: Rows,
        spec: BatchSpec,
        *,
        max_length: int,
        seed: int,
        per_step: int,
        cursor: Cursor = _START,
        rank: int = 0,
        size: int = 1,
        shares: Sequence[Share] = (),
        paired: bool = False,
        cache: ShardCache | None = None,
    ) -> None:
        self._paired = paired
        self._rows, self._spec, self._max_length, self._seed = rows, spec, max_length, seed
        self._per_step, self._rank, self._size, self._shares, self._cache = per_step, rank, size, shares, cache
        self.cursor = cursor
        self._plan = self._plan_of(cursor.epoch)

    def _plan_of(self, epoch: int) -> Plan:
        return kept_plan(
            self._rows.lengths,
            self._spec,
            max_length=self._max_length,
            seed=self._seed,
            epoch=epoch,
            shares=self._shares,
            paired=self._paired,
            cache=self._cache,
        )

    def next_step(self) -> list[Batch]:
        """This rank's micro-batches of the next optimizer step."""
        planned = [self._next() for _ in range(self._per_step)]
        mine = [self._collate(batch) for batch in planned[self._rank :: self._size]]
        if len(mine) < math.ceil(self._per_step / self._size):
            mine.append(_without_labels(self._collate(planned[-1])))
        return mine

    def _collate(self, batch: MicroBatch) -> Batch:
        if self._paired:
            return collate_pairs(self._rows, batch)
        return collate(self._rows, batch, packed=self._spec.order == "packed")

    def _next(self) -> MicroBatch:
        if self.cursor.done == len(self._plan):
            self.cursor = Cursor(self.cursor.epoch + 1, 0)
            self._plan = self._plan_of(self.cursor.epoch)
        self.cursor = Cursor(self.cursor.epoch, self.cursor.done + 1)
        return self._plan[self.cursor.done - 1]

    def num_steps(self, num_epochs: float) -> int:
        """Optimizer steps that cover `num_epochs`. The last one may include micro-batches of the next epoch."""
        whole, part = int(num_epochs), num_epochs - int(num_epochs)
        count = float(sum(self._size_of(epoch) for epoch in range(whole)))
        if part:
            count += part * self._size_of(whole)
        return max(1, math.ceil(count / self._per_step - 1e-9))

    def _size_of(self, epoch: int) -> int:
        return len(self._plan if epoch == self.cursor.epoch else self._plan_of(epoch))


def _without_labels(batch: Batch) -> Batch:
    num_pairs = None if batch.num_pairs is None else 0
    labels_BT = torch.full_like(batch.labels_BT, IGNORED)
    return batch._replace(labels_BT=labels_BT, num_tokens=0, num_targets=0, num_pairs=num_pairs)
