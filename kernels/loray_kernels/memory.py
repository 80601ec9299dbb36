"""Large tensors of CPU memory in huge pages, where the system has them: walks through them miss fewer translations."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20


def huge_pages(num_elements: int, dtype: torch.dtype) -> Tensor:
    """Zeros, (num_elements,), on the CPU. Small ones are ordinary memory."""
    num_bytes = num_elements * dtype.itemsize
    if num_bytes < _HUGE_PAGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.zeros(num_elements, dtype=dtype)
    pages = mmap.mmap(-1, num_bytes + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(pages, dtype=torch.uint8)  # it keeps the pages alive
    skip = -whole.data_ptr() % _HUGE_PAGE
    with suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE, skip, num_bytes // _HUGE_PAGE * _HUGE_PAGE)
    return whole[skip : skip + num_bytes].view(dtype)
