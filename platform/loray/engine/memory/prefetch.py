"""`Prefetch` loads adapters before requests come for them, as a new replica does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Generic, NamedTuple

from loray.engine.memory.adapter_manager import AdapterManager, R, Tier
from loray.engine.memory.host_memory import P
from loray.spec import AdapterRef


class Prefetched(NamedTuple):
    """Numbers of adapters, by what became of them. `num_late`: those that were not there when the time was up; if their
    loads had begun, they come later.
    """

    num_in_pool: int = 0
    num_on_host: int = 0
    num_failed: int = 0
    num_late: int = 0

    @property
    def total(self) -> int:
        return sum(self)


class Prefetch(Generic[P, R]):
    """One batch of adapters. It is called from the engine's thread only, between steps; the engine's steps start the
    loads.

    It drops and evicts nothing: adapters that do not fit into what is free of `host_bytes` are left out, and those for
    which `has_room` is false stay on the host.
    """

    def __init__(
        self, adapter_manager: AdapterManager[P, R], host_bytes: int, has_room: Callable[[AdapterRef], bool]
    ) -> None:
        self._adapter_manager, self._host_bytes, self._has_room = adapter_manager, host_bytes, has_room
        self._waiting: dict[str, AdapterRef] = {}
        self._in_pool = self._on_host = self._failed = 0

    def begin(self, refs: Iterable[AdapterRef]) -> bool:
        """Wait for as many of `refs` as fit, in their order; True if there is nothing to wait for."""
        table, nbytes = self._adapter_manager.table, self._adapter_manager.table.host_used
        for ref in refs:
            if ref.digest in table.entries or nbytes + ref.nbytes > self._host_bytes:
                continue
            nbytes += ref.nbytes
            table.usage.expected(ref)
            self._adapter_manager.add_waiter(ref, again=True)
            self._waiting[ref.digest] = ref
        return self.look()

    def look(self) -> bool:
        """Take what has been loaded meanwhile; True if all has."""
        for ref in list(self._waiting.values()):
            entry = self._adapter_manager.table.entries[ref.digest]
            if entry.tier is Tier.LOADING or entry.is_partial:
                continue
            if entry.tier is Tier.HOST and self._has_room(ref) and self._adapter_manager.acquire(ref) is not None:
                self._adapter_manager.release(ref)
            self._in_pool += entry.tier is Tier.POOL
            self._on_host += entry.tier is Tier.HOST
            self._failed += entry.tier is Tier.FAILED
            self._leave(ref)
        return not self._waiting

    def end(self) -> Prefetched:
        """Wait for nothing any more."""
        num_late = len(self._waiting)
        for ref in list(self._waiting.values()):
            self._leave(ref)
        return Prefetched(self._in_pool, self._on_host, self._failed, num_late)

    def _leave(self, ref: AdapterRef) -> None:
        del self._waiting[ref.digest]
        self._adapter_manager.remove_waiter(ref)
