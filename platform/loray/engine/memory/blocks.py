"""`BlockAllocator` divides one pool among KV cache, adapter rows and projections.

A block is `block_tokens` tokens of K and V for every layer, so it holds `layer_share` elements of each layer. It is in
exactly one of these states:

    free
    kv       holds KV cache; has a reference count
    layered  holds adapter rows, at the same offset in the share of every layer
    flat     holds rows without a layer (embeddings, final norm), anywhere in the block
    run      one of several neighbouring blocks that hold one contiguous tensor (VeRA's pair)

Rows of several adapters share a block. New rows go to the fullest block that fits them, so blocks that evictions have
left half empty fill up first. A block is free as soon as its last row is freed.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from itertools import accumulate
from typing import NamedTuple


class BlockKind(Enum):
    KV = "kv"
    LAYERED = "layered"
    FLAT = "flat"
    RUN = "run"


class RowBlock:
    """The free ranges of one row block, `holes`, as sorted (start, length); two of them never touch."""

    __slots__ = ("free", "holes", "kind")

    def __init__(self, kind: BlockKind, capacity: int) -> None:
        self.kind = kind
        self.holes = [(0, capacity)]
        self.free = capacity

    @property
    def widest(self) -> int:
        """The length of the longest hole."""
        return max((length for _, length in self.holes), default=0)

    def take(self, width: int, rows: int) -> list[tuple[int, int]]:
        """Take up to `rows` rows from the holes, first fit; returns (offset, rows) for each hole."""
        taken: list[tuple[int, int]] = []
        holes: list[tuple[int, int]] = []
        for start, length in self.holes:
            n = min(length // width, rows)
            if n:
                taken.append((start, n))
                rows -= n
                self.free -= n * width
            if length > n * width:
                holes.append((start + n * width, length - n * width))
        self.holes = holes
        return taken

    def give(self, start: int, length: int) -> None:
        self.free += length
        at = bisect_left(self.holes, (start, 0))
        end = start + length
        if at < len(self.holes):
            assert end <= self.holes[at][0], "a row was freed twice"
            if end == self.holes[at][0]:
                end += self.holes.pop(at)[1]
        if at:
            before, before_length = self.holes[at - 1]
            assert before + before_length <= start, "a row was freed twice"
            if before + before_length == start:
                at, start = at - 1, before
                del self.holes[at]
        self.holes.insert(at, (start, end - start))


class OpenBlocks:
    """The row blocks of one kind that have a hole for a row, by the row's width, the fullest first.

    There is one sorted list for each width that was asked for; a base and its adapters have a handful. A block that
    has no hole for any of them is in none.
    """

    def __init__(self) -> None:
        self._by_width: dict[int, list[tuple[int, int]]] = {}
        self._keys: dict[int, tuple[int, int]] = {}  # of a block: its free elements and its widest hole

    def __len__(self) -> int:
        """Row blocks of the kind, also those without a hole."""
        return len(self._keys)

    def fullest(self, width: int) -> int | None:
        """Return the fullest block with a hole for a row of `width`, of several the lowest."""
        blocks = self._by_width.get(width)
        if blocks is None:
            fitting = ((free, block) for block, (free, widest) in self._keys.items() if widest >= width)
            blocks = self._by_width[width] = sorted(fitting)
        return blocks[0][1] if blocks else None

    def update(self, block: int, row_block: RowBlock | None) -> None:
        """The holes of `block` have changed; None: it holds no rows any more."""
        before = self._keys.pop(block, None)
        after = None if row_block is None else (row_block.free, row_block.widest)
        if after is not None:
            self._keys[block] = after
        for width, blocks in self._by_width.items():
            if before is not None and before[1] >= width:
                del blocks[bisect_left(blocks, (before[0], block))]
            if after is not None and after[1] >= width:
                insort(blocks, (after[0], block))

    def check_integrity(self, row_blocks: Mapping[int, RowBlock]) -> None:
        """Raise AssertionError unless exactly `row_blocks` are known, each by its holes."""
        assert self._keys == {block: (b.free, b.widest) for block, b in row_blocks.items()}
        for width, blocks in self._by_width.items():
            assert blocks == sorted((free, block) for block, (free, widest) in self._keys.items() if widest >= width)


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes in elements unless said otherwise."""

    num_blocks: int
    num_layers: int
    block_tokens: int
    layer_share: int

    @property
    def block_size(self) -> int:
        return self.num_layers * self.layer_share

    @property
    def num_tokens(self) -> int:
        """Tokens whose K and V fill the whole pool."""
        return self.num_blocks * self.block_tokens

    def blocks_for_tokens(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_tokens)

    def blocks_for_elements(self, num_elements: int) -> int:
        """Return the blocks of a run that holds a tensor of that size."""
        return -(-num_elements // self.block_size)

    def capacity(self, kind: BlockKind) -> int:
        """Return the elements of a block in which rows of this kind can be placed."""
        return self.layer_share if kind is BlockKind.LAYERED else self.block_size


class Extent(NamedTuple):
    """`rows` neighbouring rows of `width` elements from `offset` of `block` (of each layer's share, if layered)."""

    kind: BlockKind
    block: int
    offset: int
    width: int
    rows: int


class Occupancy(NamedTuple):
    """Blocks by state."""

    free: int
    kv: int
    layered: int
    flat: int
    run: int


class BlockAllocator:
    """The only owner of the pool's map. Every `allocate_*` either gives all that was asked for, or changes nothing and
    returns None.
    """

    def __init__(self, geometry: Geometry) -> None:
        self.geometry = geometry
        # A heap: the lowest blocks are taken first. Runs are searched from the high end.
        self._free = list(range(geometry.num_blocks))
        self._kv: dict[int, int] = {}
        self._rows: dict[int, RowBlock] = {}
        self._open: defaultdict[BlockKind, OpenBlocks] = defaultdict(OpenBlocks)
        self._runs: dict[int, int] = {}

    @property
    def num_free(self) -> int:
        return len(self._free)

    def occupancy(self) -> Occupancy:
        layered, flat = len(self._open[BlockKind.LAYERED]), len(self._open[BlockKind.FLAT])
        return Occupancy(len(self._free), len(self._kv), layered, flat, sum(self._runs.values()))

    # -- KV -----------------------------------------------------------------------------------------------------------

    def allocate_kv(self, num_blocks: int) -> list[int] | None:
        if num_blocks > len(self._free):
            return None
        blocks = [heapq.heappop(self._free) for _ in range(num_blocks)]
        self._kv.update(dict.fromkeys(blocks, 1))
        return blocks

    def retain_kv(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._kv[block] += 1

    def release_kv(self, blocks: Iterable[int]) -> None:
        for block in blocks:
            self._kv[block] -= 1
            if not self._kv[block]:
                del self._kv[block]
                heapq.heappush(self._free, block)

    def references(self, block: int) -> int:
        """Return the reference count of a KV block."""
        return self._kv[block]

    # -- rows ---------------------------------------------------------------------------------------------------------

    def allocate_rows(self, kind: BlockKind, demand: Mapping[int, int]) -> list[Extent] | None:
        """Allocate rows by width, `{width: rows}`, in the fullest blocks: wide rows first, narrow ones in the tails."""
        extents: list[Extent] = []
        for width in sorted(demand, reverse=True):
            assert 0 < width <= self.geometry.capacity(kind), f"a row of {width} does not fit a block"
            remaining = demand[width]
            while remaining:
                block = self._open[kind].fullest(width)
                if block is None:
                    if not self._free:
                        self.free_rows(extents)
                        return None
                    block = heapq.heappop(self._free)
                    self._rows[block] = RowBlock(kind, self.geometry.capacity(kind))
                taken = self._rows[block].take(width, remaining)
                self._open[kind].update(block, self._rows[block])
                extents.extend(Extent(kind, block, offset, width, n) for offset, n in taken)
                remaining -= sum(n for _, n in taken)
        return extents

    def free_rows(self, extents: Iterable[Extent]) -> None:
        for e in extents:
            row_block = self._rows[e.block]
            assert row_block.kind is e.kind
            row_block.give(e.offset, e.width * e.rows)
            if row_block.free == self.geometry.capacity(e.kind):
                del self._rows[e.block]
                self._open[e.kind].update(e.block, None)
                heapq.heappush(self._free, e.block)
            else:
                self._open[e.kind].update(e.block, row_block)

    # -- runs ---------------------------------------------------------------------------------------------------------

    def allocate_run(self, num_blocks: int) -> int | None:
        """Return the first of `num_blocks` neighbouring blocks, from the high end.

        It looks at every free block, so it costs about as much as filling a few blocks; adapters that share a pair
        share its run.
        """
        if num_blocks > len(self._free):
            return None
        free = sorted(self._free, reverse=True)
        for i in range(len(free) - num_blocks + 1):
            first = free[i + num_blocks - 1]
            if free[i] - first == num_blocks - 1:
                self._free = sorted([*free[:i], *free[i + num_blocks :]])
                self._runs[first] = num_blocks
                return first
        return None

    def free_run(self, first: int) -> None:
        num_blocks = self._runs.pop(first)
        for block in range(first, first + num_blocks):
            heapq.heappush(self._free, block)

    def clear_run(self, num_blocks: int) -> dict[int, int] | None:
        """Free `num_blocks` neighbouring blocks by renaming the KV and row blocks among them; {old block: new block}.

        Of all stretches that hold no run, the one with the fewest blocks to rename is taken, the highest of several.
        None if too few blocks are free, or if every stretch holds a run. The caller copies the contents.
        """
        if num_blocks > len(self._free):
            return None
        free, fixed = set(self._free), {b for first, n in self._runs.items() for b in range(first, first + n)}
        # The sum of the blocks before each one: those to rename count 1, those of a run more than all others together.
        size = self.geometry.num_blocks
        before = list(accumulate(((b not in free) + (b in fixed) * size for b in range(size)), initial=0))
        best = min(reversed(range(size - num_blocks + 1)), key=lambda first: before[first + num_blocks] - before[first])
        window = range(best, best + num_blocks)
        if not fixed.isdisjoint(window):
            return None
        taken = [b for b in window if b not in free]
        moves = dict(zip(taken, sorted(free.difference(window)), strict=False))
        for old, new in moves.items():
            if old in self._kv:
                self._kv[new] = self._kv.pop(old)
            else:
                row_block = self._rows[new] = self._rows.pop(old)
                self._open[row_block.kind].update(old, None)
                self._open[row_block.kind].update(new, row_block)
        self._free = sorted((free | moves.keys()) - set(moves.values()))
        return moves

    # -- checking -----------------------------------------------------------------------------------------------------

    def check_integrity(
        self, kv_references: Mapping[int, int], extents: Iterable[Extent], runs: Mapping[int, int]
    ) -> None:
        """Raise AssertionError unless every block and row is free, or held by exactly the given references."""
        assert dict(kv_references) == self._kv, "KV references differ from the allocator's counts"
        assert dict(runs) == self._runs, "runs differ from the allocator's"
        states = [*self._free, *self._kv, *self._rows]
        states += [b for first, n in self._runs.items() for b in range(first, first + n)]
        assert sorted(states) == list(range(self.geometry.num_blocks)), "a block is in no state, or in two"
        used: dict[int, list[tuple[int, int]]] = {block: [] for block in self._rows}
        for e in extents:
            assert self._rows[e.block].kind is e.kind
            used[e.block].append((e.offset, e.width * e.rows))
        for block, row_block in self._rows.items():
            position = 0
            assert used[block], f"block {block} holds no row and is not free"
            for start, length in sorted([*used[block], *row_block.holes]):
                assert start == position, f"block {block}: element {position} is held twice, or by nothing"
                position += length
            assert position == self.geometry.capacity(row_block.kind)
            assert row_block.free == sum(length for _, length in row_block.holes)
        for kind, blocks in self._open.items():
            blocks.check_integrity({block: b for block, b in self._rows.items() if b.kind is kind})
