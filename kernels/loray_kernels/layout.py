"""Checks and copies that several backends make before they hand tensors to compiled kernels."""

from __future__ import annotations

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
