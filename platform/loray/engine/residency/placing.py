"""Copies adapters from the host into the pool and removes them, and knows whose rows are still on their way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic

from loray.engine.residency.eviction import AdapterWorth
from loray.engine.residency.table import AdapterTable, Entry, P, R, Tier
from loray.spec import AdapterRef


class Placing(Generic[P, R]):
    """The arguments are Residency's."""

    def __init__(
        self,
        table: AdapterTable[P, R],
        worth: AdapterWorth,
        place: Callable[[AdapterRef, P], R | None],
        remove: Callable[[R], None],
        size: Callable[[R], float],
        arrived: Callable[[R], bool],
        clock: Callable[[], float],
    ) -> None:
        self._table, self._worth = table, worth
        self._place, self._remove, self._size, self._arrived, self._now = place, remove, size, arrived, clock

    def place(self, entry: Entry[P, R]) -> bool:
        """False if blocks are short. Raises what `place` raises."""
        assert entry.packed is not None
        began = self._now()
        entry.resident = self._place(entry.ref, entry.packed)
        if entry.resident is None:
            return False
        entry.tier = Tier.POOL
        seconds = None if entry.is_partial else self._now() - began
        self._worth.placed(entry.score, seconds, self._size(entry.resident))
        if not self._arrived(entry.resident):
            self._table.arriving[entry.ref.digest] = entry
        self._table.update(entry)
        return True

    def take_arrived(self, *, at_once: bool) -> list[str]:
        """Digests of those whose rows have arrived since the last call; `at_once`: of all that are on their way."""
        arriving = self._table.arriving
        found = [d for d, e in arriving.items() if at_once or (e.resident is not None and self._arrived(e.resident))]
        for digest in found:
            del arriving[digest]
        return found

    def remove(self, entry: Entry[P, R]) -> None:
        """From the pool."""
        assert entry.resident is not None
        self._table.arriving.pop(entry.ref.digest, None)
        self._remove(entry.resident)
        entry.resident = None
