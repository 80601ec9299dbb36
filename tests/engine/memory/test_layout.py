"""What a pool's blocks hold, by position: all of them, and never more than so many stretches."""

from __future__ import annotations

import pytest

from loray.engine.memory.blocks import BlockAllocator, BlockKind, Geometry
from loray.engine.memory.kv_cache import PrefixCache
from loray.engine.memory.layout import MOST_STRETCHES, layout, summary


def pool(num_blocks: int) -> tuple[BlockAllocator, PrefixCache]:
    geometry = Geometry(num_blocks=num_blocks, num_layers=3, block_tokens=2, layer_share=64)
    allocator = BlockAllocator(geometry)
    return allocator, PrefixCache(allocator)


def test_every_block_is_where_it_is() -> None:
    allocator, cache = pool(20)
    assert layout(allocator, cache) == (("free", 20),)
    held, ended = allocator.allocate_kv(3), allocator.allocate_kv(2)
    assert held is not None
    assert ended is not None
    allocator.allocate_rows(BlockKind.LAYERED, {64: 2})
    allocator.allocate_rows(BlockKind.FLAT, {64: 1})
    allocator.allocate_run(4)
    cache.store(None, [1, 2, 3, 4], ended)
    cache.release(ended)
    allocator.release_kv(held[1:2])
    assert layout(allocator, cache) == (
        ("kv", 1),
        ("free", 1),
        ("kv", 1),
        ("cached", 2),
        ("layered", 2),
        ("flat", 1),
        ("free", 8),
        ("run", 4),
    )


@pytest.mark.parametrize("num_blocks", [1, 199, 200, 401, 1000, 30_011])
def test_stretches_are_few_and_the_whole_pool(num_blocks: int) -> None:
    allocator, cache = pool(num_blocks)
    blocks = allocator.allocate_kv(num_blocks)
    assert blocks is not None
    allocator.release_kv(blocks[: num_blocks // 2 : 2])  # no block is like the next one
    found = layout(allocator, cache)
    assert len(found) <= MOST_STRETCHES
    assert sum(stretch.num_blocks for stretch in found) == num_blocks


def test_few_stretches_are_exact_in_a_pool_of_any_size() -> None:
    assert summary(b"\0" * 70_000 + b"\1" + b"\0" * 9) == (("kv", 70_000), ("layered", 1), ("kv", 9))


def test_of_a_share_its_commonest_state_is_shown() -> None:
    holds = b"\0\0\1" * 100 + b"\1\1\0" * 100  # 600 blocks: shares of three
    assert summary(holds) == (("kv", 300), ("layered", 300))
