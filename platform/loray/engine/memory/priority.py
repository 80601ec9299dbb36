"""A priority queue whose items can be changed and removed."""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T", bound=Hashable)

_MIN_STALE = 64


class PriorityQueue(Generic[T]):
    """Items by key, the least first; of equal keys the one that was set first. Every call takes O(log n), amortised.

    A changed or removed item stays in the heap as a stale entry; the heap is made anew when most entries are stale.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Any, int, T]] = []
        self._valid: dict[T, int] = {}
        self._num_set = 0

    def __len__(self) -> int:
        return len(self._valid)

    def __contains__(self, item: T) -> bool:
        return item in self._valid

    def __iter__(self) -> Iterator[T]:
        """In no order."""
        return iter(self._valid)

    def items(self) -> set[T]:
        """O(n)."""
        return set(self._valid)

    def set(self, item: T, key: Any) -> None:
        """Add the item, or change its key."""
        self._num_set += 1
        self._valid[item] = self._num_set
        heapq.heappush(self._heap, (key, self._num_set, item))
        if len(self._heap) > 2 * len(self._valid) + _MIN_STALE:
            self._heap = [entry for entry in self._heap if self._valid.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)

    def discard(self, item: T) -> None:
        self._valid.pop(item, None)

    def peek(self) -> tuple[Any, T] | None:
        """The least key and its item; None if there is none."""
        while self._heap:
            key, number, item = self._heap[0]
            if self._valid.get(item) == number:
                return key, item
            heapq.heappop(self._heap)
        return None
