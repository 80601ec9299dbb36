"""One eviction priority for prefixes and adapters.

    value = inflation at the last use + expected further uses · seconds to have it again / blocks that it frees

What has the lowest value is evicted first (GreedyDual-Size-Frequency). The inflation is the value of what was
evicted last. It rises, so the value of what is not used falls behind, however long it takes to have it again. Seconds
are measured. Source: Cherkasova, "Improving WWW Proxies Performance with Greedy-Dual-Size-Frequency Caching Policy", HP
Laboratories, 1998; there, all uses count as expected ones.
"""

from __future__ import annotations

import heapq
from collections.abc import Generator, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

_MEMORY = 4096  # after that many further items, an item's weight in the share has fallen to 1/e
_MIN_STALE = 64

T = TypeVar("T", bound=Hashable)


class Inflation:
    """The value of what was evicted last, shared by all that compete for the pool's blocks."""

    def __init__(self) -> None:
        self.value = 0.0

    def evicted(self, value: float) -> None:
        self.value = max(self.value, value)


class Reuse:
    """How often items of one class are used again.

    Most prompts are never seen again, and most adapters are: an item that was used once is worth the share of such
    items that were used a second time. Every use after the first counts whole.
    """

    def __init__(self) -> None:
        self._num_items, self._num_used_again = 2.0, 1.0  # before anything is known: one in two

    def used(self, uses: int) -> None:
        """An item was used, for the time `uses`."""
        if uses == 1:
            keep = 1 - 1 / _MEMORY
            self._num_items = keep * self._num_items + 1
            self._num_used_again *= keep
        elif uses == 2:
            self._num_used_again += 1

    def expected(self, uses: int) -> float:
        """Return the further uses expected of an item with so many uses."""
        return max(0, uses - 1) + min(1.0, self._num_used_again / self._num_items)


class PriorityQueue(Generic[T]):
    """Items by key, the least first; of equal keys the one that was set first. Every call takes O(log n), amortised.

    A changed or removed item stays in the heap as a stale entry; the heap is made anew when most entries are stale.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[Any, int, T]] = []
        self._valid: dict[T, int] = {}
        self._num_set = 0

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

    def ascending(self) -> Generator[T]:
        """Yield the items, the least first. Nothing else is called before this is closed; O(log n) for each of them."""
        taken: list[tuple[Any, int, T]] = []
        try:
            while self._heap:
                entry = heapq.heappop(self._heap)
                if self._valid.get(entry[2]) == entry[1]:
                    taken.append(entry)
                    yield entry[2]
        finally:
            for entry in taken:
                heapq.heappush(self._heap, entry)

    def peek(self) -> tuple[Any, T] | None:
        """The least key and its item; None if there is none."""
        while self._heap:
            key, number, item = self._heap[0]
            if self._valid.get(item) == number:
                return key, item
            heapq.heappop(self._heap)
        return None


@dataclass(slots=True)
class EvictionScore:
    """The state of one adapter. `uses`: since it came into the pool."""

    inflation: float = 0.0
    uses: int = 0
    place_seconds: float = 0.0
    load_seconds: float = 0.0


class EvictionPolicy:
    """Changes the scores of adapters, and values them."""

    def __init__(self) -> None:
        self.inflation = Inflation()
        self.reuse = Reuse()

    def placed(self, score: EvictionScore, seconds: float) -> None:
        score.uses, score.place_seconds = 0, seconds

    def used(self, score: EvictionScore) -> None:
        score.uses += 1
        self.reuse.used(score.uses)
        self.released(score)

    def released(self, score: EvictionScore) -> None:
        """A use has ended; it may have begun long ago, so the inflation is taken again."""
        score.inflation = self.inflation.value

    def value(self, score: EvictionScore, size: float, *, on_host: bool) -> float:
        """`size`: the blocks that it frees."""
        seconds = score.place_seconds if on_host else score.place_seconds + score.load_seconds
        return score.inflation + self.reuse.expected(score.uses) * seconds / size
