"""Loads that have started: their results come from other threads, in the order in which they end."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Generic

from loray.engine.residency.table import Entry, P, R
from loray.spec import AdapterRef


class StartedLoads(Generic[P, R]):
    """Writes `load` and `load_began` of entries.

    load   starts a load and returns its future; never blocks
    wake   called in the loader's thread when `ended` has something to give
    clock  seconds
    """

    def __init__(
        self, load: Callable[[AdapterRef], Future[P]], wake: Callable[[], None], clock: Callable[[], float]
    ) -> None:
        self._load, self._wake, self._clock = load, wake, clock
        self._results: deque[tuple[Entry[P, R], Future[P]]] = deque()

    def start(self, entry: Entry[P, R]) -> None:
        entry.load_began = self._clock()
        entry.load = self._load(entry.ref)
        entry.load.add_done_callback(partial(self._end, entry))

    def cancel(self, entry: Entry[P, R]) -> bool:
        """False if it runs already: then it goes on."""
        if entry.load is None or not entry.load.cancel():
            return False
        entry.load = None
        return True

    def ended(self) -> Iterator[tuple[Entry[P, R], Future[P]]]:
        """Each load that has ended, once; those that were cancelled are left out."""
        while self._results:
            entry, load = self._results.popleft()
            if entry.load is load:
                entry.load = None
                yield entry, load

    def _end(self, entry: Entry[P, R], load: Future[P]) -> None:
        self._results.append((entry, load))
        self._wake()
