"""Compaction: rows of half-empty blocks are moved into the gaps of other blocks, so that whole blocks become free.

Adapters share blocks row by row, and evictions leave gaps. The emptiest blocks are emptied first, each completely or
not at all. A row is moved as a whole, so only the offsets in an adapter's table change.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from loray.engine.memory.blocks import BlockAllocator, BlockKind, Extent


class Copy(NamedTuple):
    """Rows to copy from `old` to `new`, which has the same number of rows of the same width."""

    old: Extent
    new: Extent


def close_gaps(allocator: BlockAllocator, owned: Sequence[list[Extent]], num_blocks: int) -> list[Copy]:
    """Free up to `num_blocks` row blocks.

    `owned` are the extents of each adapter, all that the allocator has given out; changed in place. Returns the
    copies, which the caller makes in this order before it writes anything else.
    """
    rows: dict[int, list[tuple[int, Extent]]] = defaultdict(list)
    used: Counter[int] = Counter()
    for owner, extents in enumerate(owned):
        for e in extents:
            rows[e.block].append((owner, e))
            used[e.block] += e.width * e.rows
    gaps: Counter[BlockKind] = Counter()
    for block, members in rows.items():
        gaps[members[0][1].kind] += _capacity(allocator, members) - used[block]
    copies: list[Copy] = []
    for block in sorted(used, key=lambda b: (used[b], b)):
        if not num_blocks:
            break
        members, capacity = rows[block], _capacity(allocator, rows[block])
        own_gaps = capacity - sum(e.width * e.rows for _, e in members)
        if capacity - own_gaps > gaps[members[0][1].kind] - own_gaps:
            continue
        moved = _empty(allocator, block, [e for _, e in members])
        if moved is None:
            continue
        gaps[members[0][1].kind] -= capacity
        num_blocks -= 1
        for (owner, old), pieces in zip(members, moved, strict=True):
            at = owned[owner].index(old)
            owned[owner][at : at + 1] = [copy.new for copy in pieces]
            for copy in pieces:
                rows[copy.new.block].append((owner, copy.new))
                copies.append(copy)
    return copies


def _capacity(allocator: BlockAllocator, members: Sequence[tuple[int, Extent]]) -> int:
    return allocator.geometry.capacity(members[0][1].kind)


def _empty(allocator: BlockAllocator, block: int, extents: Sequence[Extent]) -> list[list[Copy]] | None:
    """Allocate other places for the rows of `block`; the copies of each extent. None, and nothing changed, if there is
    no room.
    """
    demand: Counter[int] = Counter()
    for e in extents:
        demand[e.width] += e.rows
    places = allocator.allocate_rows(extents[0].kind, demand, emptying=block)
    if places is None:
        return None
    by_width: dict[int, list[Extent]] = defaultdict(list)
    for place in reversed(places):
        by_width[place.width].append(place)
    moved = []
    for old in extents:
        pieces: list[Copy] = []
        offset, left = old.offset, old.rows
        while left:
            place = by_width[old.width].pop()
            n = min(left, place.rows)
            pieces.append(Copy(old._replace(offset=offset, rows=n), place._replace(rows=n)))
            if n < place.rows:
                by_width[old.width].append(place._replace(offset=place.offset + n * old.width, rows=place.rows - n))
            offset, left = offset + n * old.width, left - n
        moved.append(pieces)
    allocator.free_rows(extents)
    return moved
