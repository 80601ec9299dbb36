"""Adapters from pinned host memory into the pool's blocks, on a stream of their own beside the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loray_kernels.cuda.gather import Gather


class Piece(NamedTuple):
    """Elements [start, start + length) of the pages go to the pool's from `to` on."""

    start: int
    to: int
    length: int


class PageUploader:
    """One copy over the bus for an adapter, then one kernel that scatters it; the step's stream is never waited for.

    Called from the engine's thread. Not run yet: there was no GPU. The kernel is tested on a CPU.
    """

    def __init__(self, gather: Gather, device: torch.device) -> None:
        self._gather = gather
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def place(self, pool: Tensor, pages: Tensor, pieces: Sequence[Piece]) -> torch.cuda.Event:
        """Queue the copy of `pages` (one dimension, pinned, the pool's dtype) to where `pieces` say. Writes `pool`.

        The stream of the steps waits for the event before the first step that reads the rows. The copy itself waits
        for what that stream has queued so far, because those steps may read what stood in the blocks before.
        ValueError when `pages` is not pinned: such a copy would hold up the thread.
        """
        if not pages.is_pinned():
            raise ValueError("pages are not pinned; allocate them with pin_memory=True")
        assert pages.dtype == pool.dtype
        table = torch.tensor(pieces, dtype=torch.int64).pin_memory()
        self._stream.wait_stream(torch.cuda.current_stream(pool.device))
        with torch.cuda.stream(self._stream):
            staged = pages.to(pool.device, non_blocking=True)
            self._gather.place_pages(pool, staged, table.to(pool.device, non_blocking=True))
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(self._stream)
        return event
