"""Copies of adapters from pinned memory into blocks, beside the steps. Shapes: P pieces, L layers, E elements."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from loray_kernels.cuda.launch import SUFFIX, Launcher
from loray_kernels.kv import PageCopy, to_device

STAGING_BYTES = 64 << 20  # of the device, which an adapter's rows pass through
_THREADS = 128  # as in csrc/rows.cu


class PageUploader:
    """A PageWriter: for each call one copy over the bus, then one kernel that scatters it. No thread waits for either.

    It has not run on a GPU yet. The table and the kernel are tested on a CPU.
    """

    def __init__(self, launch: Launcher, pool: Tensor) -> None:
        self._launch, self._pool = launch, pool
        self._stream = torch.cuda.Stream(pool.device)  # type: ignore[no-untyped-call]
        self._written = False

    def write(self, rows_LE: Tensor, layer_offsets: Sequence[int], pieces: Sequence[PageCopy]) -> None:
        """Queue the copy, which waits for the steps that are queued so far: they may read the blocks' old contents.

        This thread first copies rows that are not pinned to pinned memory: a copy from other memory would block the
        thread until the stream reaches it. Rows that are on the device already are scattered from there.
        """
        assert rows_LE.dtype == self._pool.dtype
        table_P3 = piece_table(rows_LE.shape[1], layer_offsets, pieces)
        if not table_P3.shape[0]:
            return
        device = self._pool.device
        if rows_LE.device == device:
            rows_LE.record_stream(self._stream)
        elif not rows_LE.is_pinned():
            rows_LE = rows_LE.pin_memory()
        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for rows, part_P3 in parts(rows_LE.view(-1), table_P3, STAGING_BYTES // rows_LE.itemsize):
                pages = rows.to(device, non_blocking=True)
                place_pages(self._launch, self._pool, pages, to_device(part_P3, device))
        self._written = True

    def wait(self) -> None:
        """Let the steps' stream wait for this one."""
        if self._written:
            torch.cuda.current_stream(self._pool.device).wait_stream(self._stream)
            self._written = False

    def arrival(self) -> Callable[[], bool]:
        """Ask an event after the last copy and its kernel."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event.query


def place_pages(launch: Launcher, pool: Tensor, pages: Tensor, pieces_P3: Tensor) -> None:
    """pool[to : to + length] = pages[from : from + length] for each piece (from, to, length)."""
    arguments = pool.data_ptr(), pages.data_ptr(), pieces_P3.data_ptr()
    launch(f"place_pages_{SUFFIX[pool.dtype]}", (pieces_P3.shape[0], 1, 1), _THREADS, arguments)


def parts(rows: Tensor, table_P3: Tensor, num_elements: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Cut `rows`, (elements,), and their `piece_table` into stretches of at most `num_elements`, each with a table of
    its own; those without a piece are left out.
    """
    if len(rows) <= num_elements:
        yield rows, table_P3
        return
    start_P, to_P, length_P = table_P3.unbind(1)
    for first in range(0, len(rows), num_elements):
        own = rows[first : first + num_elements]
        own_start_P = start_P.clamp(min=first)
        own_stop_P = (start_P + length_P).clamp(max=first + len(own))
        own_P3 = torch.stack([own_start_P - first, to_P + own_start_P - start_P, own_stop_P - own_start_P], dim=1)
        if len(own_P3 := own_P3[own_stop_P > own_start_P]):
            yield own, own_P3


def piece_table(num_elements: int, layer_offsets: Sequence[int], pieces: Sequence[PageCopy]) -> Tensor:
    """Give `pieces` for every layer, for `place_pages`: int64 (start in all rows, offset in the pool, length).

    num_elements  of one layer's rows
    """
    pieces_P3 = torch.tensor(pieces, dtype=torch.int64).view(-1, 3)
    offsets_L = torch.tensor(layer_offsets, dtype=torch.int64)
    table_LP3 = pieces_P3.expand(offsets_L.shape[0], *pieces_P3.shape).clone()
    table_LP3[:, :, 0] += torch.arange(offsets_L.shape[0])[:, None] * num_elements
    table_LP3[:, :, 1] += offsets_L[:, None]
    return table_LP3.view(-1, 3)
