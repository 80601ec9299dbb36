"""One step with partial adapters: each layer waits for its rows, and the end of the step for the rest.

A chunk counts only if its adapter is complete, and so verified, at the end of the step. Otherwise nothing of the chunk
is kept or sent, and its request waits until the adapter is done. So if an adapter comes later than predicted, its
request computes a chunk twice, and the other requests of the step wait at most MAX_WAIT_S. If a byte is wrong, only the
adapter's own requests fail.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from loray.engine.model.batch import Batch
from loray.engine.pool.pool import Pool, ResidentAdapter
from loray.engine.request import Chunk

T = TypeVar("T")

MAX_WAIT_S = 0.05  # of one step, in all; about the duration of a step


class PartialAdapters:
    """The adapters of one step that were not complete when it began."""

    def __init__(
        self,
        pool: Pool,
        residents: Iterable[ResidentAdapter],
        *,
        max_wait_s: float = MAX_WAIT_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pool, self._now = pool, clock
        self._left_s = max_wait_s
        self._adapters = [r for r in residents if r.pending is not None]
        self._loads = [r.pending.partial for r in self._adapters if r.pending and r.pending.partial]

    def __bool__(self) -> bool:
        return bool(self._adapters)

    def wait_for_layer(self, layer: int) -> None:
        """Copy the rows of `layer` into the pool. An adapter whose rows do not come in time is late from then on."""
        for adapter in self._adapters:
            assert adapter.pending is not None
            load = adapter.pending.partial
            if adapter.num_layers > layer or load is None or load.late:
                continue
            there = self._timed(lambda a=load: a.wait_for_layers(layer + 1, self._left_s))  # type: ignore[misc]
            self._pool.take(adapter, min(there, self._pool.geometry.num_layers))
            load.late = there <= layer

    def drop_incomplete(
        self, chunks: Sequence[Chunk], batch: Batch, logits_RV: Tensor
    ) -> tuple[list[Chunk], Batch, Tensor]:
        """Drop the chunks, and their rows, whose adapters are not complete in time."""
        incomplete = self._incomplete()
        if not incomplete:
            return list(chunks), batch, logits_RV
        rows = [c.request.adapter_digest not in incomplete for c in batch.sampled]
        batch = replace(
            batch,
            sampled=tuple(c for c in batch.sampled if c.request.adapter_digest not in incomplete),
            scored=tuple(part for part in batch.scored if part.request.adapter_digest not in incomplete),
        )
        left = [c for c in chunks if c.request.adapter_digest not in incomplete]
        return left, batch, logits_RV[torch.tensor(rows, dtype=torch.bool, device=logits_RV.device)]

    def end_step(self) -> None:
        """Let loaders use the cores for work that is not urgent."""
        for load in self._loads:
            load.mark_used()

    def _incomplete(self) -> set[str]:
        """Find the digests of adapters that are not complete; waits for each adapter unless it is late."""
        incomplete = set()
        for adapter in self._adapters:
            assert adapter.pending is not None
            load = adapter.pending.partial
            assert load is not None
            if not load.late and self._timed(lambda a=load: a.wait(self._left_s)):  # type: ignore[misc]
                adapter.pending = None
            else:
                load.late = True
                incomplete.add(adapter.ref.digest)
        return incomplete

    def _timed(self, wait: Callable[[], T]) -> T:
        began = self._now()
        result = wait()
        self._left_s = max(0.0, self._left_s - (self._now() - began))
        return result
