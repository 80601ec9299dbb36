"""Descriptors of adapters: their places in the table, and what is read from them."""

from __future__ import annotations

import numpy as np
import torch

from loray_kernels import DescriptorAllocator, InputShape, LoraRows, descriptor_words
from loray_kernels.descriptors import MAX_ROWS, read_descriptor

ONE = ((0, 8),)
SHAPES = (
    InputShape(((0, 4), (4, 4)), (ONE, ((0, 2), (2, 2)), ONE)),
    InputShape(ONE, (ONE,)),
    InputShape(ONE, (ONE, ONE)),
    InputShape(ONE, (ONE,)),
)
Q = LoraRows(([10, 20], [30, 40]), ([50, 60],), 0.5)
K = LoraRows(([11], [31]), ([71], [72]), 1.25)
DOWN = LoraRows(([7, 8, 9],), ([1, 2, 3],), 2.0)


def test_blocks_are_read_as_they_were_written() -> None:
    words = descriptor_words([{"q_proj": Q, "k_proj": K}, {"down_proj": DOWN}], [0, -1, 1, 0], SHAPES)
    assert words is not None
    allocator = DescriptorAllocator(SHAPES, torch.device("cpu"), num_words=200)
    assert allocator.add(np.zeros(3, dtype=np.int64)) == 0
    start = allocator.add(words)
    assert start == 3
    for layer in (0, 3):
        assert read_descriptor(allocator.table.words, start, 4 * layer, SHAPES[0]) == [Q, K, None]
        assert read_descriptor(allocator.table.words, start, 4 * layer + 3, SHAPES[3]) == []
    assert read_descriptor(allocator.table.words, start, 4 * 2 + 3, SHAPES[3]) == [DOWN]
    assert not any(read_descriptor(allocator.table.words, start, 4 + i, shape) for i, shape in enumerate(SHAPES))


def test_too_many_rows_have_no_descriptor() -> None:
    rows = LoraRows((range(MAX_ROWS),), (range(MAX_ROWS),), 1.0)
    assert descriptor_words([{"down_proj": rows}], [0], SHAPES) is not None
    rows = LoraRows((range(MAX_ROWS + 1),), (range(MAX_ROWS + 1),), 1.0)
    assert descriptor_words([{"down_proj": rows}], [0], SHAPES) is None


def test_places_are_used_again_and_joined() -> None:
    allocator = DescriptorAllocator((), torch.device("cpu"), num_words=30)
    ten = np.arange(10, dtype=np.int64)
    starts = [allocator.add(ten) for _ in range(4)]
    assert starts == [0, 10, 20, None]
    allocator.remove(0, 10)
    assert allocator.add(np.zeros(11, dtype=np.int64)) is None
    allocator.remove(10, 10)
    assert allocator.add(np.zeros(20, dtype=np.int64)) == 0
    allocator.write(20, ten + 1)
    assert allocator.table.words.tolist() == [0] * 20 + (ten + 1).tolist()
