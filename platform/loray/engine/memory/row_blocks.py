"""The gaps in blocks that hold adapter rows, and in which block a row fits."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping
from enum import Enum


class Kind(Enum):
    KV = "kv"
    LAYERED = "layered"
    FLAT = "flat"
    RUN = "run"


class RowBlock:
    """The free ranges of one row block, `holes`, as sorted (start, length); two of them never touch."""

    __slots__ = ("free", "holes", "kind")

    def __init__(self, kind: Kind, capacity: int) -> None:
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

    def fullest(self, width: int, *, besides: int | None = None) -> int | None:
        """The fullest block with a hole for a row of `width`, of several the lowest; not `besides`."""
        return next((block for _, block in self._for(width)[:2] if block != besides), None)

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
        """AssertionError unless exactly `row_blocks` are known, each by its holes."""
        assert self._keys == {block: (b.free, b.widest) for block, b in row_blocks.items()}
        for width, blocks in self._by_width.items():
            assert blocks == sorted((free, block) for block, (free, widest) in self._keys.items() if widest >= width)

    def _for(self, width: int) -> list[tuple[int, int]]:
        blocks = self._by_width.get(width)
        if blocks is None:
            fitting = ((free, block) for block, (free, widest) in self._keys.items() if widest >= width)
            blocks = self._by_width[width] = sorted(fitting)
        return blocks
