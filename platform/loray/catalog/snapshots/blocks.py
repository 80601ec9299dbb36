"""An immutable sorted map whose changed copies share what did not change.

A change of one key copies its block and the list of blocks: microseconds at a hundred thousand keys, where a copy of a
dictionary and of a sorted list of its keys would take milliseconds each.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

K = TypeVar("K", int, str)
V = TypeVar("V")

_FULL = 512  # keys of a block; a larger one is split


class _Block(NamedTuple, Generic[K, V]):
    """Keys in order, and their values."""

    keys: tuple[K, ...]
    values: tuple[V, ...]


class SortedMap(Mapping[K, V]):
    """Never changes: `changed` returns another one."""

    __slots__ = ("_blocks", "_firsts", "_len")

    def __init__(self, items: Iterable[tuple[K, V]] = ()) -> None:
        """`items`: of different keys, in any order."""
        self._set(_blocks_of(sorted(items, key=lambda item: item[0])))

    def __getitem__(self, key: K) -> V:
        found = self.find(key)
        if found is None:
            raise KeyError(key)
        return found

    def __contains__(self, key: object) -> bool:
        return self.find(key) is not None  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[K]:
        return (key for block in self._blocks for key in block.keys)

    def __len__(self) -> int:
        return self._len

    def find(self, key: K) -> V | None:
        """The key's value; None where it is not here. Values are never None."""
        i = bisect_right(self._firsts, key) - 1
        if i < 0:
            return None
        keys, values = self._blocks[i]
        at = bisect_left(keys, key)
        return values[at] if at < len(keys) and keys[at] == key else None

    def after(self, key: K | None) -> Iterator[V]:
        """The values of the keys after `key` in order; None: all."""
        if key is None:
            start, at = 0, 0
        else:
            start = max(0, bisect_right(self._firsts, key) - 1)
            at = bisect_right(self._blocks[start].keys, key) if self._blocks else 0
        for i in range(start, len(self._blocks)):
            yield from self._blocks[i].values[at:]
            at = 0

    def around(self, key: K, count: int) -> Sequence[K]:
        """At most `count` keys in a row, those beside the place of `key` in the order."""
        if not self._blocks:
            return ()
        first = last = max(0, bisect_right(self._firsts, key) - 1)
        keys: tuple[K, ...] = self._blocks[first].keys
        while first > 0 and bisect_left(keys, key) < count:
            first -= 1
            keys = self._blocks[first].keys + keys
        while last + 1 < len(self._blocks) and len(keys) - bisect_left(keys, key) < count:
            last += 1
            keys += self._blocks[last].keys
        start = min(max(0, bisect_left(keys, key) - count // 2), max(0, len(keys) - count))
        return keys[start : start + count]

    def changed(self, changes: Mapping[K, V | None]) -> SortedMap[K, V]:
        """A copy with these values; a key of None is left out."""
        if not changes:
            return self
        by_block: dict[int, dict[K, V | None]] = {}
        for key, value in changes.items():
            by_block.setdefault(max(0, bisect_right(self._firsts, key) - 1), {})[key] = value
        blocks = list(self._blocks)
        for i in sorted(by_block, reverse=True):
            before: dict[K, V | None] = dict(zip(*blocks[i], strict=True)) if blocks else {}
            merged = before | by_block[i]
            kept = sorted(((k, v) for k, v in merged.items() if v is not None), key=lambda item: item[0])
            blocks[i : i + 1] = _blocks_of(kept)
        copy: SortedMap[K, V] = SortedMap.__new__(SortedMap)
        copy._set(blocks)
        return copy

    def _set(self, blocks: Sequence[_Block[K, V]]) -> None:
        self._blocks: tuple[_Block[K, V], ...] = tuple(blocks)
        self._firsts: tuple[Any, ...] = tuple(block.keys[0] for block in blocks)
        self._len = sum(len(block.keys) for block in blocks)


def _blocks_of(items: Sequence[tuple[K, V]]) -> list[_Block[K, V]]:
    """Blocks of half the size, so that they have room, of a block that became too large or of a whole map."""
    size = len(items) if len(items) <= _FULL else _FULL // 2
    parts = (items[i : i + size] for i in range(0, len(items), size or 1))
    return [_Block(tuple(k for k, _ in part), tuple(v for _, v in part)) for part in parts]
