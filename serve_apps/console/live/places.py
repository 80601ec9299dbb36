"""Where adapters and blocks are, as tables and pictures of bounded size."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

from loray.schemas.status import ReplicaStatus
from loray.spec import Stretch

# What a pool's block holds, in the order of the pictures.
KINDS: Mapping[str, str] = {
    "kv": "KV cache of requests",
    "cached": "prefixes that no request holds",
    "layered": "rows of adapters in layers",
    "flat": "other rows of adapters",
    "run": "VeRA pairs",
    "free": "free",
}
_TIERS = (("host", "adapters_on_host"), ("loading", "adapters_loading"), ("pool", "adapters_in_pool"))


class PlaceRow(NamedTuple):
    """Where an adapter is: `tiers` has pool, loading, host or nothing for each replica."""

    adapter: str
    tiers: tuple[str, ...]


class BarPart(NamedTuple):
    """Blocks of one kind: `begin` and `share` are of all blocks, from 0 to 1."""

    kind: str
    num_blocks: int
    begin: float
    share: float


def heat_map(replicas: Sequence[ReplicaStatus], num_rows: int) -> tuple[list[PlaceRow], int]:
    """The `num_rows` adapters that most replicas hold, then by name, and how many adapters are held at all."""
    tiers: dict[str, dict[int, str]] = {}
    for at, replica in enumerate(replicas):
        for tier, field in _TIERS:
            for name in getattr(replica, field):
                tiers.setdefault(name, {})[at] = tier
    most = heapq.nsmallest(num_rows, tiers.items(), key=lambda item: (-len(item[1]), item[0]))
    columns = range(len(replicas))
    return [PlaceRow(name, tuple(held.get(at, "") for at in columns)) for name, held in most], len(tiers)


def parts_of(blocks: Mapping[str, int]) -> list[BarPart]:
    """The pool of one replica by what its blocks hold; all kinds, in the order of `KINDS`."""
    num_blocks = sum(blocks.values()) or 1
    parts, begin = [], 0
    for kind in KINDS:
        count = blocks.get(kind, 0)
        parts.append(BarPart(kind, count, begin / num_blocks, count / num_blocks))
        begin += count
    return parts


def strip_of(layout: Sequence[Stretch]) -> list[tuple[str, str]]:
    """The pool of one replica by position, 1000 × 10 units in size: each kind with the path of its stretches."""
    num_blocks, at = sum(stretch.num_blocks for stretch in layout) or 1, 0
    paths: dict[str, list[str]] = {}
    for kind, count in layout:
        width = f"{1000 * count / num_blocks:.1f}"
        paths.setdefault(kind, []).append(f"M{1000 * at / num_blocks:.1f} 0h{width}v10h-{width}z")
        at += count
    return [(kind, "".join(parts)) for kind, parts in paths.items()]


def rows_of(layout: Sequence[Stretch]) -> list[tuple[int, int, str]]:
    """The pool as a table: the first block and the last one of each stretch, and its kind."""
    ends = list(accumulate(stretch.num_blocks for stretch in layout))
    return [(end - count, end - 1, kind) for (kind, count), end in zip(layout, ends, strict=True)]
