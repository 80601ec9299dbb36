"""Large tensors of CPU memory in huge pages, where the system has them: walks through them miss fewer translations.

Memory that a process touches for the first time costs more than what is then done with it: a page fault and zeroing, on
a virtual machine the host's fault as well (2 MB: 0.4 to 4.5 ms). `Recycled` keeps it instead of giving it back.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20


def huge_pages(num_elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros, (num_elements,), on the CPU. Small ones are ordinary memory."""
    num_bytes = num_elements * dtype.itemsize
    if num_bytes < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(num_elements, dtype=dtype)
    pages = _map(num_bytes)
    return _tensor(memoryview(pages), num_elements, dtype)


class Recycled:
    """Large tensors whose memory is used again once nobody holds it; up to `max_bytes` lie idle. From any thread.

    expected  bytes of tensors that the first `prepare` is for
    """

    def __init__(self, max_bytes: int, expected: Iterable[int] = ()) -> None:
        self._max_bytes = max_bytes
        self._idle: list[mmap.mmap] = []
        self._taken = list(expected)  # bytes of each since the last `prepare`
        self._lock = threading.Lock()

    @property
    def idle_bytes(self) -> int:
        with self._lock:
            return sum(map(len, self._idle))

    def empty(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """(num_elements,), on the CPU, with any contents."""
        num_bytes = num_elements * dtype.itemsize
        if num_bytes < _HUGE_PAGE:
            return torch.empty(num_elements, dtype=dtype)
        with self._lock:
            self._taken.append(num_bytes)
            pages = self._best(num_bytes)
            if pages is not None:
                self._idle.remove(pages)
        if pages is None:
            pages = _map(_rounded(num_bytes))
        lease = memoryview(pages)  # the tensor's storage holds it, and lets go of it at the end
        weakref.finalize(lease, self._give_back, pages)
        return _tensor(lease, num_elements, dtype)

    def prepare(self) -> None:
        """Touch memory for as many tensors, as large, as were asked for since the last call, where none lies idle."""
        with self._lock:
            expected, self._taken = self._taken, []
            idle = list(self._idle)
            missing = []
            for num_bytes in expected:
                pages = self._best(num_bytes, idle)
                if pages is None:
                    missing.append(_rounded(num_bytes))
                else:
                    idle.remove(pages)
            room = self._max_bytes - sum(map(len, self._idle))
        for num_bytes in missing:
            if (room := room - num_bytes - _HUGE_PAGE) < 0:
                return
            pages = _map(num_bytes)
            touched = _tensor(memoryview(pages), num_bytes, torch.uint8)
            ctypes.memset(touched.data_ptr(), 0, num_bytes)  # other threads run meanwhile
            del touched
            self._give_back(pages)

    def _best(self, num_bytes: int, idle: list[mmap.mmap] | None = None) -> mmap.mmap | None:
        """The smallest idle one that is large enough, unless most of it would stay unused."""
        least, most = num_bytes + _HUGE_PAGE, 2 * _rounded(num_bytes) + _HUGE_PAGE
        fits = [p for p in (self._idle if idle is None else idle) if least <= len(p) <= most]
        return min(fits, key=len, default=None)

    def _give_back(self, pages: mmap.mmap) -> None:
        with self._lock:
            self._idle.append(pages)
            while sum(map(len, self._idle)) > self._max_bytes:
                self._idle.pop(0)


def _rounded(num_bytes: int) -> int:
    """To a few sizes, so that one fits the next: an eighth of a power of two, whole huge pages."""
    step = max(_HUGE_PAGE, 1 << max(0, num_bytes.bit_length() - 4))
    return -(-num_bytes // step) * step


def _map(num_bytes: int) -> mmap.mmap:
    """Pages of which `num_bytes` can be used whatever their alignment."""
    return mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _tensor(pages: memoryview, num_elements: int, dtype: torch.dtype) -> Tensor:
    num_bytes = num_elements * dtype.itemsize
    whole = torch.frombuffer(pages, dtype=torch.uint8)  # it keeps the pages alive
    skip = -whole.data_ptr() % _HUGE_PAGE
    with suppress(OSError, AttributeError):  # a system without them
        pages.obj.madvise(mmap.MADV_HUGEPAGE, skip, num_bytes // _HUGE_PAGE * _HUGE_PAGE)  # type: ignore[attr-defined]
    return whole[skip : skip + num_bytes].view(dtype)
