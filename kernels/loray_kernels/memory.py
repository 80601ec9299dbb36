"""Large tensors of CPU memory in huge pages, if the system has them: fewer misses of address translations.

When a process touches memory for the first time, the page fault and the zeroing take longer than most uses of it; on a
virtual machine there is a fault of the host as well (2 MB: 0.4 to 4.5 ms). `Recycled` keeps memory for the next tensors
instead of freeing it, and `keep_freed` makes the C library do so for all others.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Iterable
from contextlib import suppress

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_SHARED = 16 * _HUGE_PAGE
_LINE = 64
_OUT_OF_MEMORY = ("out of memory", "OUT_OF_MEMORY", "STATUS_ALLOC_FAILED")  # what CUDA, CuPy, Triton and cuBLAS say
_MALLOPT = {  # mallopt(3): parameters of <malloc.h>, and their values in bytes
    -3: 32 << 20,  # M_MMAP_THRESHOLD: larger blocks go back to the system when they are freed; the most that is allowed
    -1: 256 << 20,  # M_TRIM_THRESHOLD: free memory at the end of the heap, above which it is given back
    -2: 64 << 20,  # M_TOP_PAD: by how much a heap grows, and what is left of it; a thread's heaps are as large
}


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether a device has too little memory. Only torch has an error of its own for that."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)


def huge_pages(num_elements: int, dtype: torch.dtype) -> Tensor:
    """Make zeros, (num_elements,), on the CPU. Small tensors are ordinary memory."""
    num_bytes = num_elements * dtype.itemsize
    if num_bytes < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(num_elements, dtype=dtype)
    size = -(-num_bytes // _HUGE_PAGE) * _HUGE_PAGE
    return _tensor(memoryview(_map(size)), size, torch.uint8)[:num_bytes].view(dtype)


class SharedPages:
    """Zeros that are cut from large mappings, one after the other, for tensors that live as long as each other: the
    matrices of a small model are smaller than a huge page. A mapping is kept until the last of its tensors is gone.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._left = torch.empty(0, dtype=torch.uint8)

    def zeros(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """Make zeros, (num_elements,), on the CPU."""
        num_bytes = num_elements * dtype.itemsize
        if num_bytes > _SHARED // 2 or not hasattr(mmap, "MADV_HUGEPAGE"):
            return huge_pages(num_elements, dtype)
        size = -(-num_bytes // _LINE) * _LINE
        with self._lock:
            if len(self._left) < size:
                self._left = _tensor(memoryview(_map(_SHARED)), _SHARED, torch.uint8)
            taken, self._left = self._left[:num_bytes], self._left[size:]
        return taken.view(dtype)


def keep_freed() -> None:
    """Keep freed blocks of up to 32 MB in this process, 256 MB of them, for its next allocations in any thread.

    glibc gives large blocks back to the system as soon as they are freed. A step that makes and frees the same few
    tensors takes their pages again each time: a batch of 32 that samples from 49,152 tokens has 4,576 page faults, a
    sixth of the step. Does nothing with another C library.
    """
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt"):
        for parameter, value in _MALLOPT.items():
            library.mallopt(parameter, value)


class Recycled:
    """Large tensors whose memory is used again after the last reference is gone. May be used from any thread.

    max_bytes  the most memory that is kept idle
    expected   bytes of each tensor for which the first `prepare` provides memory
    """

    def __init__(self, max_bytes: int, expected: Iterable[int] = ()) -> None:
        self._max_bytes = max_bytes
        self._idle: list[mmap.mmap] = []
        self._returned: deque[mmap.mmap] = deque()  # that are not among the idle ones yet
        self._taken = list(expected)  # bytes of each since the last `prepare`
        self._lock = threading.Lock()

    def empty(self, num_elements: int, dtype: torch.dtype) -> Tensor:
        """Make a tensor, (num_elements,), on the CPU, with any contents."""
        num_bytes = num_elements * dtype.itemsize
        if num_bytes < _HUGE_PAGE:
            return torch.empty(num_elements, dtype=dtype)
        with self._lock:
            self._take_returned()
            self._taken.append(num_bytes)
            pages = self._best(num_bytes)
            if pages is not None:
                self._idle.remove(pages)
        if pages is None:
            pages = _map(_rounded(num_bytes))
        lease = memoryview(pages)  # the tensor's storage refers to it for as long as it lives
        weakref.finalize(lease, self._give_back, pages)
        return _tensor(lease, num_elements, dtype)

    def prepare(self) -> None:
        """Provide touched memory for tensors as many and as large as those made since the last call, unless enough is
        idle.
        """
        with self._lock:
            self._take_returned()
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
            ctypes.memset(touched.data_ptr(), 0, num_bytes)  # without Python's lock
            del touched
            self._give_back(pages)

    def _best(self, num_bytes: int, idle: list[mmap.mmap] | None = None) -> mmap.mmap | None:
        """The smallest idle memory that is large enough, unless most of it would be unused."""
        least, most = num_bytes + _HUGE_PAGE, 2 * _rounded(num_bytes) + _HUGE_PAGE
        fits = [p for p in (self._idle if idle is None else idle) if least <= len(p) <= most]
        return min(fits, key=len, default=None)

    def _give_back(self, pages: mmap.mmap) -> None:
        # Python's garbage collection may call this in a thread that holds the lock, which therefore is not waited for.
        self._returned.append(pages)
        if self._lock.acquire(blocking=False):
            try:
                self._take_returned()
            finally:
                self._lock.release()

    def _take_returned(self) -> None:
        """The caller holds the lock."""
        while self._returned:
            self._idle.append(self._returned.popleft())
        while sum(map(len, self._idle)) > self._max_bytes:
            self._idle.pop(0)


def _rounded(num_bytes: int) -> int:
    """Rounded up to multiples of an eighth of a power of two and of huge pages, so that memory fits later tensors."""
    step = max(_HUGE_PAGE, 1 << max(0, num_bytes.bit_length() - 4))
    return -(-num_bytes // step) * step


def _map(num_bytes: int) -> mmap.mmap:
    """Enough pages for `num_bytes` after alignment to a huge page."""
    return mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _tensor(pages: memoryview, num_elements: int, dtype: torch.dtype) -> Tensor:
    num_bytes = num_elements * dtype.itemsize
    whole = torch.frombuffer(pages, dtype=torch.uint8)  # it keeps the pages alive
    skip = -whole.data_ptr() % _HUGE_PAGE
    with suppress(OSError, AttributeError):  # a system without them
        pages.obj.madvise(mmap.MADV_HUGEPAGE, skip, num_bytes // _HUGE_PAGE * _HUGE_PAGE)  # type: ignore[attr-defined]
    return whole[skip : skip + num_bytes].view(dtype)
