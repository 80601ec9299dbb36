"""LoRA by descriptors, as captured decode steps compute it, in CUDA C++ compiled for the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import pytest
import torch

from loray_kernels import (
    INPUTS,
    AdapterSegments,
    DescriptorAllocator,
    InputShape,
    LoraRows,
    LoraTable,
    Ops,
    RowTables,
    StepDescriptors,
    descriptor_words,
)
from tests.kernels.cuda.cases import REFERENCE, near, randn
from tests.kernels.cuda.test_shim import launcher, ops  # noqa: F401

A_COLUMNS = ((0, 24), (24, 16))
B_COLUMNS = (((0, 100), (100, 36)), ((0, 24),), ((0, 8),))
SHAPES = (InputShape(A_COLUMNS, B_COLUMNS), *(InputShape(((0, 8),), (((0, 8),),)),) * 3)
RANKS = ((5, 0, 1), (0, 0, 0), (2, 70, 0), (0, 3, 3))  # of q, k and v, for each adapter
SPANS = ((1, 4), (4, 5), (5, 9), (9, 11))  # their tokens; 0 and 11 are the base's
LAYER_SHARE = 40_000


def table(adapters: Sequence[Sequence[LoraRows]], module: int) -> LoraTable:
    def rows(columns: Sequence[tuple[int, int]], side: str) -> RowTables:
        offsets = [[o for own in adapters for o in getattr(own[module], side)[s]] for s in range(len(columns))]
        return RowTables(tuple((c, w, torch.tensor(o)) for (c, w), o in zip(columns, offsets, strict=True)))

    starts = tuple(accumulate((ranks[module] for ranks in RANKS), initial=0))
    scales = tuple(own[module].scale for own in adapters)
    return LoraTable(rows(A_COLUMNS, "a"), rows(B_COLUMNS[module], "b"), starts, scales)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_is_what_a_steps_tables_give(ops: Ops, dtype: torch.dtype) -> None:  # noqa: F811
    """Bit for bit. Rows are cut into segments; adapters lack modules or have nothing in a layer; the last item is
    padding.
    """
    places = iter(range(0, LAYER_SHARE - 200, 101))

    def rows(rank: int, columns: Sequence[tuple[int, int]]) -> tuple[list[int], ...]:
        return tuple([next(places) for _ in range(rank)] for _ in columns)

    adapters = [
        [LoraRows(rows(rank, A_COLUMNS), rows(rank, B_COLUMNS[m]), 0.5 + m + n) for m, rank in enumerate(ranks)]
        for n, ranks in enumerate(RANKS)
    ]
    allocator = DescriptorAllocator(SHAPES, torch.device("cpu"), num_words=2000)
    items = []
    for own, (first, stop) in zip(adapters, SPANS, strict=True):
        found = {name: lora for name, lora in zip(INPUTS[0], own, strict=True) if lora.a[0]}
        words = descriptor_words([found], [-1, 0], SHAPES)
        assert words is not None
        items.append((allocator.add(words), first, stop - first))
    step = StepDescriptors(allocator.table, torch.tensor([*items, (0, 0, 0)]))
    segments = AdapterSegments(tuple(first for first, _ in SPANS), tuple(stop for _, stop in SPANS))
    tables = tuple(table(adapters, module) for module in range(3))
    pool, x_TI, y_TO = randn(2, dtype, 2 * LAYER_SHARE), randn(3, dtype, 12, 40), randn(4, dtype, 12, 168)
    got, want, expected = (torch.split(y_TO.clone(), (136, 24, 8), dim=1) for _ in range(3))
    ops.lora_by_descriptor(x_TI, got, pool, step, 4, LAYER_SHARE)
    h = ops.lora_shrink(x_TI, pool, tables, segments, LAYER_SHARE)
    ops.lora_expand(want, h, pool, tables, segments, LAYER_SHARE)
    REFERENCE.lora_by_descriptor(x_TI, expected, pool, step, 4, LAYER_SHARE)
    for y, same, close in zip(got, want, expected, strict=True):
        assert torch.equal(y, same)
        near(y, close, dtype)
    before = [y.clone() for y in got]
    ops.lora_by_descriptor(x_TI, got, pool, step, 0, 0)  # nobody has anything in this layer
    assert all(map(torch.equal, got, before))
