"""Checks and copies that several backends make before they hand tensors to compiled kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loray_kernels.records import RowTables


def token_rows(x: Tensor) -> Tensor:
    """`x`, or a copy if the elements of a token are not contiguous. Tokens may be any stride apart."""
    if x.is_contiguous() or (x.stride(-1) == 1 and (x.dim() == 2 or x.stride(1) == x.shape[2])):
        return x
    return x.contiguous()


def row_size(rows: RowTables) -> tuple[int, int]:
    """(number of rows, columns). AssertionError unless the segments follow each other and have equally many rows."""
    num, width = rows.segments[0][2].shape[0], 0
    for column, columns, offsets_R in rows.segments:
        assert column == width
        assert offsets_R.shape[0] == num
        width += columns
    return num, width


def side_by_side(h: Sequence[Tensor]) -> Tensor:
    """The modules' intermediates as columns of one matrix: that of `lora_shrink` if they are still its parts, else a
    copy.
    """
    first, width = h[0], sum(t.shape[1] for t in h)
    at, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for h_TR in h:
        if (
            h_TR.untyped_storage().data_ptr() != storage
            or h_TR.data_ptr() != at
            or h_TR.stride() != (first.stride(0), 1)
            or h_TR.dtype is not torch.float32
        ):
            return torch.cat([t.float() for t in h], dim=1)
        at += h_TR.shape[1] * h_TR.element_size()
    return first.as_strided((first.shape[0], width), first.stride())
