"""Compaction, and making room for runs: as many blocks become free as arithmetic says, and no element changes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loray.engine.memory.blocks import BlockAllocator, BlockKind, Extent, Geometry
from loray.engine.memory.compaction import close_gaps

GEOMETRY = Geometry(num_blocks=12, num_layers=1, block_tokens=4, layer_share=64)


class Rows:
    """Adapters in a pool of plain numbers: element k of an adapter is (its number, k)."""

    def __init__(self) -> None:
        self.allocator = BlockAllocator(GEOMETRY)
        self.memory: dict[tuple[int, int], tuple[int, int]] = {}
        self.extents: dict[int, list[Extent]] = {}

    def place(self, name: int, demand: dict[int, int], kind: BlockKind = BlockKind.LAYERED) -> None:
        extents = self.allocator.allocate_rows(kind, demand)
        if extents is not None:
            self.extents[name] = extents
            for k, at in enumerate(elements(extents)):
                self.memory[at] = (name, k)

    def remove(self, name: int) -> None:
        self.allocator.free_rows(self.extents.pop(name))

    def compact(self, num_blocks: int = 99) -> int:
        free = self.allocator.num_free
        for old, new in close_gaps(self.allocator, list(self.extents.values()), num_blocks):
            assert (old.width, old.rows, old.kind) == (new.width, new.rows, new.kind)
            for source, target in zip(elements([old]), elements([new]), strict=True):
                self.memory[target] = self.memory[source]
        self.check()
        return self.allocator.num_free - free

    def check(self) -> None:
        """Among rows of one width, an adapter's elements are read in the order in which they were written."""
        self.allocator.check_integrity({}, [e for es in self.extents.values() for e in es], {})
        for name, extents in self.extents.items():
            found = [self.memory[at] for at in elements(extents)]
            assert found == [(name, k) for k in range(len(found))]


def elements(extents: list[Extent]) -> list[tuple[int, int]]:
    return [(e.block, e.offset + i) for e in extents for i in range(e.width * e.rows)]


def test_half_empty_blocks_become_whole_ones() -> None:
    """Eight rows of half a block fill four blocks; without every second row, two blocks are enough."""
    rows = Rows()
    for name in range(8):
        rows.place(name, {32: 1})
    assert rows.allocator.num_free == 8
    for name in range(1, 8, 2):
        rows.remove(name)
    assert rows.allocator.num_free == 8
    assert rows.compact(1) == 1
    assert rows.compact() == 1
    assert rows.compact() == 0
    assert rows.allocator.occupancy().layered == 2


def test_an_extent_is_split_over_several_gaps() -> None:
    """Four blocks of three rows, each with a gap of one: twelve rows need three."""
    rows = Rows()
    for name in range(4):
        rows.place(name, {16: 3})
        rows.place(10 + name, {16: 1})
    for name in range(10, 14):
        rows.remove(name)
    assert rows.allocator.occupancy().layered == 4
    assert rows.compact() == 1
    assert [len(extents) for extents in rows.extents.values()] == [3, 1, 1, 1]
    assert rows.compact() == 0


def test_gaps_too_narrow_for_a_row_free_nothing() -> None:
    rows = Rows()
    for name in range(4):
        rows.place(name, {40: 1})
    assert rows.compact() == 0


def test_kinds_do_not_mix() -> None:
    rows = Rows()
    rows.place(0, {16: 1}, BlockKind.LAYERED)
    rows.place(1, {16: 1}, BlockKind.FLAT)
    assert rows.compact() == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12))
def test_any_pool_stays_whole(seed: int, num_blocks: int) -> None:
    rng = random.Random(seed)
    rows = Rows()
    for name in range(30):
        kind = rng.choice([BlockKind.LAYERED, BlockKind.LAYERED, BlockKind.FLAT])
        rows.place(name, {width: rng.randint(1, 5) for width in rng.sample([5, 8, 16, 24], 2)}, kind)
    for name in list(rows.extents):
        if rng.random() < 0.5:
            rows.remove(name)
    assert rows.compact(num_blocks) <= num_blocks
    free = rows.allocator.num_free
    rows.compact()
    assert rows.compact() == 0
    assert rows.allocator.num_free >= free


def test_a_run_is_cleared_where_least_is_in_the_way() -> None:
    allocator = BlockAllocator(GEOMETRY)
    kv = allocator.allocate_kv(12)
    assert kv == list(range(12))
    allocator.release_kv([0, 3, 5, 6, 8, 11])
    assert allocator.allocate_run(3) is None
    moves = allocator.clear_run(3)
    # Of the stretches of three with two free blocks, 5–7 and 6–8 and 4–6 and 3–5, the highest: block 7 must go.
    assert moves == {7: 0}
    references = dict.fromkeys([0, 1, 2, 4, 9, 10], 1)
    allocator.check_integrity(references, [], {})
    assert allocator.allocate_run(3) == 6
    assert allocator.clear_run(3) == {4: 11}


def test_a_run_moves_no_other_run_and_needs_enough_free_blocks() -> None:
    allocator = BlockAllocator(GEOMETRY)
    runs = [allocator.allocate_run(3) for _ in range(4)]
    assert runs == [9, 6, 3, 0]
    allocator.free_run(9)
    allocator.free_run(3)
    assert allocator.clear_run(4) is None  # six are free, in two stretches with a run between
    assert allocator.clear_run(7) is None


@pytest.mark.parametrize("num_blocks", [1, 3, 5])
def test_rows_and_kv_give_way_to_a_run(num_blocks: int) -> None:
    allocator = BlockAllocator(GEOMETRY)
    kv = allocator.allocate_kv(9)
    extents = allocator.allocate_rows(BlockKind.LAYERED, {64: 3})
    assert kv is not None
    assert extents is not None
    given_back, kept = kv[::2], kv[1::2]
    allocator.release_kv(given_back)
    moves = allocator.clear_run(num_blocks)
    assert moves is not None
    assert allocator.allocate_run(num_blocks) is not None
    extents = [e._replace(block=moves.get(e.block, e.block)) for e in extents]
    (run,) = allocator._runs.items()
    allocator.check_integrity({moves.get(b, b): 1 for b in kept}, extents, dict([run]))
