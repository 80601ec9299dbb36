"""The allocator: random allocations of KV blocks, rows and runs; integrity is checked after every step."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from loray.engine.memory.blocks import BlockAllocator, BlockKind, Extent, Geometry

GEOMETRY = Geometry(num_blocks=12, num_layers=3, block_tokens=4, layer_share=64)


class Life(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.allocator = BlockAllocator(GEOMETRY)
        self.kv: list[list[int]] = []
        self.adapters: list[list[Extent]] = []
        self.runs: dict[int, int] = {}

    @rule(n=st.integers(1, 5))
    def allocate_kv(self, n: int) -> None:
        free = self.allocator.num_free
        blocks = self.allocator.allocate_kv(n)
        assert (blocks is None) == (n > free)
        if blocks is not None:
            self.kv.append(blocks)

    @rule(data=st.data())
    def share_kv(self, data: st.DataObject) -> None:
        if self.kv:
            blocks = data.draw(st.sampled_from(self.kv))
            self.allocator.retain_kv(blocks)
            self.kv.append(list(blocks))

    @rule(data=st.data())
    def release_kv(self, data: st.DataObject) -> None:
        if self.kv:
            self.allocator.release_kv(self.kv.pop(data.draw(st.integers(0, len(self.kv) - 1))))

    @rule(
        kind=st.sampled_from([BlockKind.LAYERED, BlockKind.FLAT]),
        demand=st.dictionaries(st.sampled_from([5, 8, 16, 24, 64]), st.integers(1, 20), min_size=1),
    )
    def allocate_rows(self, kind: BlockKind, demand: dict[int, int]) -> None:
        before = self.allocator.occupancy()
        extents = self.allocator.allocate_rows(kind, demand)
        if extents is None:
            assert self.allocator.occupancy() == before
            return
        rows: Counter[int] = Counter()
        for e in extents:
            rows[e.width] += e.rows
        assert rows == demand
        self.adapters.append(extents)

    @rule(data=st.data())
    def free_rows(self, data: st.DataObject) -> None:
        if self.adapters:
            self.allocator.free_rows(self.adapters.pop(data.draw(st.integers(0, len(self.adapters) - 1))))

    @rule(n=st.integers(1, 4))
    def allocate_run(self, n: int) -> None:
        first = self.allocator.allocate_run(n)
        if first is not None:
            self.runs[first] = n

    @rule(data=st.data())
    def free_run(self, data: st.DataObject) -> None:
        if self.runs:
            first = data.draw(st.sampled_from(sorted(self.runs)))
            del self.runs[first]
            self.allocator.free_run(first)

    @invariant()
    def whole(self) -> None:
        kv = Counter(b for blocks in self.kv for b in blocks)
        self.allocator.check_integrity(kv, [e for a in self.adapters for e in a], self.runs)


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=40, deadline=None, derandomize=True)


def test_rows_go_to_the_fullest_block_that_fits() -> None:
    allocator = BlockAllocator(GEOMETRY)
    first = allocator.allocate_rows(BlockKind.LAYERED, {16: 4})
    second = allocator.allocate_rows(BlockKind.LAYERED, {16: 2})
    assert first is not None
    assert second is not None
    allocator.free_rows([first[0]._replace(rows=1)])
    third = allocator.allocate_rows(BlockKind.LAYERED, {16: 1})
    assert third == [first[0]._replace(rows=1)]
    assert allocator.occupancy().layered == 2


def test_integrity_finds_a_leak() -> None:
    allocator = BlockAllocator(GEOMETRY)
    assert allocator.allocate_kv(1)
    with pytest.raises(AssertionError, match="KV references"):
        allocator.check_integrity({}, [], {})
    extents = allocator.allocate_rows(BlockKind.LAYERED, {16: 2})
    assert extents is not None
    with pytest.raises(AssertionError, match="held twice, or by nothing"):
        allocator.check_integrity({0: 1}, [extents[0]._replace(rows=1)], {})


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
