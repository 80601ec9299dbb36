"""Copies of blocks of keys and values between the pool and host memory, beside the steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from loray.engine.pool.packed import bytes_taken
from loray_kernels import use_device


class TensorCopies:
    """The BlockCopies of a pool's tensor. On a GPU each direction has a stream, and copies are page-locked; a thread
    takes that memory and waits for what is saved, the engine's thread waits for nothing.

    It has not run on a GPU yet; on a CPU, where a copy has no use, it is tested.
    """

    def __init__(self, pool: Tensor, block_size: int) -> None:
        """`block_size`: elements of a block."""
        self._blocks_NE, self._device, self._is_written = pool.view(-1, block_size), pool.device, False
        self._saves: torch.cuda.Stream | None = None
        self._restores: torch.cuda.Stream | None = None
        if pool.is_cuda:
            self._saves, self._restores = (torch.cuda.Stream(pool.device) for _ in range(2))  # type: ignore[no-untyped-call]
        self._thread = ThreadPoolExecutor(1, "block-copy", use_device, (pool.device,))

    @property
    def host_bytes(self) -> int:
        return bytes_taken(self._blocks_NE[0], pinned=self._blocks_NE.is_cuda)

    def save(self, blocks: Sequence[int]) -> Future[list[Tensor]]:
        computed = None
        if self._saves is not None:
            computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
            computed.record(torch.cuda.current_stream(self._device))
        return self._thread.submit(self._save, tuple(blocks), computed)

    def restore(self, copies: Mapping[int, Tensor]) -> Callable[[], bool]:
        if self._restores is not None:  # steps that are queued may read what was there
            self._restores.wait_stream(torch.cuda.current_stream(self._device))
        with _within(self._restores):
            for block, copy_E in copies.items():
                self._blocks_NE[block].copy_(copy_E, non_blocking=True)
        if self._restores is None:
            return lambda: True
        self._is_written = True
        there = torch.cuda.Event()  # type: ignore[no-untyped-call]
        there.record(self._restores)
        return there.query

    def wait(self) -> None:
        if self._is_written and self._restores is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._restores)
        self._is_written = False

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _save(self, blocks: Sequence[int], computed: torch.cuda.Event | None) -> list[Tensor]:
        pinned = self._blocks_NE.is_cuda
        copies = [torch.empty(self._blocks_NE.shape[1], dtype=self._blocks_NE.dtype, pin_memory=pinned) for _ in blocks]
        with _within(self._saves):
            if self._saves is not None and computed is not None:
                self._saves.wait_event(computed)
            for block, copy_E in zip(blocks, copies, strict=True):
                copy_E.copy_(self._blocks_NE[block], non_blocking=True)
        if self._saves is not None:
            self._saves.synchronize()
        return copies


def _within(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return nullcontext() if stream is None else torch.cuda.stream(stream)
