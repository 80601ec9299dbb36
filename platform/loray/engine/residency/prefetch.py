"""Loads adapters before requests need them, when an engine starts: into host memory, and into the pool where there is
room.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, NamedTuple

from loray.engine.residency.residency import Residency
from loray.engine.residency.table import P, R, Tier
from loray.spec import AdapterRef


class Prefetched(NamedTuple):
    """Numbers of adapters, by what became of them. `num_late`: they were not there when the time was up; those whose
    loads had begun come later.
    """

    num_in_pool: int = 0
    num_on_host: int = 0
    num_failed: int = 0
    num_late: int = 0

    @property
    def total(self) -> int:
        return sum(self)


class Prefetch(Generic[P, R]):
    """One batch. Called from the engine's thread only, between steps; the engine's steps start the loads.

    It drops and evicts nothing: adapters that do not fit into what is free of `host_bytes` are left out, and those for
    which `has_room` is false stay on the host.
    """

    def __init__(self, residency: Residency[P, R], host_bytes: int, has_room: Callable[[AdapterRef], bool]) -> None:
        self._residency, self._host_bytes, self._has_room = residency, host_bytes, has_room
        self._waiting: dict[str, AdapterRef] = {}
        self._in_pool = self._on_host = self._failed = 0

    def begin(self, refs: Iterable[AdapterRef]) -> bool:
        """Wants as many of `refs` as fit, in their order. Returns whether nothing is to be waited for."""
        table, nbytes = self._residency.table, self._residency.table.host_used
        for ref in refs:
            if ref.digest in table.entries or nbytes + ref.nbytes > self._host_bytes:
                continue
            nbytes += ref.nbytes
            table.usage.expected(ref)
            self._residency.want(ref, again=True)
            self._waiting[ref.digest] = ref
        return self.look()

    def look(self) -> bool:
        """Takes what has been loaded meanwhile. Returns whether all has."""
        for ref in list(self._waiting.values()):
            entry = self._residency.table.entries[ref.digest]
            if entry.tier is Tier.LOADING or entry.is_partial:
                continue
            if entry.tier is Tier.HOST and self._has_room(ref) and self._residency.acquire(ref) is not None:
                self._residency.release(ref)
            self._in_pool += entry.tier is Tier.POOL
            self._on_host += entry.tier is Tier.HOST
            self._failed += entry.tier is Tier.FAILED
            self._leave(ref)
        return not self._waiting

    def end(self) -> Prefetched:
        """Waits for nothing any more."""
        num_late = len(self._waiting)
        for ref in list(self._waiting.values()):
            self._leave(ref)
        return Prefetched(self._in_pool, self._on_host, self._failed, num_late)

    def _leave(self, ref: AdapterRef) -> None:
        del self._waiting[ref.digest]
        self._residency.unwant(ref)
