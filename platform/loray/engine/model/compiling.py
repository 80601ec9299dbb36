"""Runs the ops of a prompt with adapters once for each kernel that they may need, so that no request compiles one.

Which kernel an op takes depends on the base, on how many rows of A an adapter has for an input: 16, 32, or more, and on
whether the rank of a VeRA pair is a multiple of 16. All rows are the pool's first elements, and the results go nowhere.

Shapes: T tokens, I input width, O output width, R ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loray_kernels import InputShape, LoraTable, Ops, PairMatrix, RowTables, Segments, VeraTable

_TOKENS = 32  # a tile
_NUM_ROWS = (16, 32, 64)
_PAIR_RANKS = (64, 24)
_Columns = tuple[tuple[int, int], ...]


@torch.inference_mode()
def compile_adapters(ops: Ops, pool: Tensor, inputs: Sequence[InputShape]) -> None:
    """`inputs`: of the rank's part of the base. Writes nothing that is kept."""
    for shape in inputs:
        x_TI = pool.new_zeros(_TOKENS, _width(shape.a))
        outputs = torch.split(pool.new_zeros(_TOKENS, sum(map(_width, shape.b))), [_width(b) for b in shape.b], dim=1)
        for num_rows in _NUM_ROWS:
            _lora(ops, pool, shape, num_rows // len(shape.b), x_TI, outputs)
        for rank in _PAIR_RANKS:
            _vera(ops, pool, shape, rank, x_TI, outputs[0])


def _lora(ops: Ops, pool: Tensor, shape: InputShape, rank: int, x_TI: Tensor, outputs: tuple[Tensor, ...]) -> None:
    segments = Segments((0,), (_TOKENS,))
    tables = tuple(
        LoraTable(_rows(shape.a, rank, pool), _rows(b, rank, pool), (0, rank), (1.0,)) for b in map(tuple, shape.b)
    )
    h = ops.lora_shrink(x_TI, pool, tables, segments, 0)
    ops.lora_expand(outputs, h, pool, tables, segments, 0)


def _vera(ops: Ops, pool: Tensor, shape: InputShape, rank: int, x_TI: Tensor, y_TO: Tensor) -> None:
    a_RI = PairMatrix(pool.new_zeros(rank, x_TI.shape[1]))
    b_OR = PairMatrix(pool.new_zeros(y_TO.shape[1], rank))
    d, b = _rows(((0, rank),), _TOKENS, pool), _rows(shape.b[0], _TOKENS, pool)
    z_TR = ops.vera_shrink(x_TI, a_RI)
    ops.vera_expand(y_TO, z_TR, pool, VeraTable(a_RI, b_OR, d, b, 0, _TOKENS), 0)


def _rows(columns: _Columns, num: int, pool: Tensor) -> RowTables:
    at = torch.zeros(num, dtype=torch.int64, device=pool.device)
    return RowTables(tuple((column, width, at) for column, width in columns))


def _width(columns: _Columns) -> int:
    return sum(width for _, width in columns)
