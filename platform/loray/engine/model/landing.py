"""One step over adapters that are still arriving: each layer waits for their rows, the end of the step for the rest.

A chunk counts only where its adapter has landed by the end of the step, whole and verified. Otherwise nothing of it is
kept or sent, and its request is held back until the adapter is done. So a wrong prediction costs that request a chunk
computed twice, everyone else in the step at most MAX_WAIT_S, and a wrong byte costs nothing but its own requests.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from loray.engine.model.batch import Batch
from loray.engine.pool.pool import Pool
from loray.engine.pool.resident import ResidentAdapter
from loray.engine.scheduling.scheduler import Chunk

T = TypeVar("T")

MAX_WAIT_S = 0.05  # of one step in all; about what one step takes


class Landings:
    """The adapters of one step that were not whole when it began."""

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
        self._arriving = [r for r in residents if r.arriving is not None]
        self._arrivals = [r.arriving.arrival for r in self._arriving if r.arriving and r.arriving.arrival]

    def __bool__(self) -> bool:
        return bool(self._arriving)

    def wait_for_layer(self, layer: int) -> None:
        """Bring the rows of `layer` into the pool, or give up on those adapters whose are not there in time."""
        for adapter in self._arriving:
            assert adapter.arriving is not None
            arrival = adapter.arriving.arrival
            if adapter.num_layers > layer or arrival is None or arrival.late:
                continue
            there = self._timed(lambda a=arrival: a.wait_for_layers(layer + 1, self._left_s))  # type: ignore[misc]
            self._pool.take(adapter, min(there, self._pool.geometry.num_layers))
            arrival.late = there <= layer

    def settle(self, chunks: Sequence[Chunk], batch: Batch, logits_RV: Tensor) -> tuple[list[Chunk], Batch, Tensor]:
        """The same without what does not count."""
        unsettled = self._unsettled()
        if not unsettled:
            return list(chunks), batch, logits_RV
        rows = [c.request.adapter_digest not in unsettled for c in batch.sampled]
        for part in batch.scored:
            rows += [part.request.adapter_digest not in unsettled] * (part.stop - part.start)
        batch = replace(
            batch,
            sampled=tuple(c for c in batch.sampled if c.request.adapter_digest not in unsettled),
            scored=tuple(part for part in batch.scored if part.request.adapter_digest not in unsettled),
        )
        kept = [c for c in chunks if c.request.adapter_digest not in unsettled]
        return kept, batch, logits_RV[torch.tensor(rows, dtype=torch.bool, device=logits_RV.device)]

    def over(self) -> None:
        """The step is over: loaders may have the cores for what is not urgent."""
        for arrival in self._arrivals:
            arrival.use()

    def _unsettled(self) -> set[str]:
        unsettled = set()
        for adapter in self._arriving:
            assert adapter.arriving is not None
            arrival = adapter.arriving.arrival
            assert arrival is not None
            if not arrival.late and self._timed(lambda a=arrival: a.wait(self._left_s)):  # type: ignore[misc]
                adapter.arriving = None
            else:
                arrival.late = True
                unsettled.add(adapter.ref.digest)
        return unsettled

    def _timed(self, wait: Callable[[], T]) -> T:
        began = self._now()
        result = wait()
        self._left_s = max(0.0, self._left_s - (self._now() - began))
        return result
