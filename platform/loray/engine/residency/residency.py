"""How adapters move: loading from the store, to host memory, into the pool and back. The one owner of that truth.

    absent → LOADING → HOST ⇄ POOL        a failed load fails those who need it and leaves no trace

An adapter may be usable, on the host or in the pool, while the last of it still arrives; where a step has waited for
it in vain it is LOADING again until it is whole.
Loading runs elsewhere and blocks nobody; there is one flight per adapter whatever the number of requests. An adapter
is pinned in the pool while a request that uses it runs, and stays there idle afterwards until its rows are needed.

Flights begin in the order in which they were asked for, as far as host memory goes. What nobody waits for makes room,
least recently used first, and then what is needed only by requests that asked after those who wait for the flight:
small adapters in demand cannot keep a large one out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from typing import Generic

from loray.engine.residency.eviction import GreedyDual
from loray.engine.residency.host import HostMemory
from loray.engine.residency.table import AdapterTable, Entry, P, R, Tier
from loray.engine.stats.histogram import Histogram
from loray.engine.stats.usage import ResidencyCounts, UsageLog
from loray.errors import EngineError
from loray.spec import AdapterRef
from loray.telemetry import METRICS


class Residency(Generic[P, R]):
    """Called from the engine's thread alone. What it knows is in its `table`, for others to look at.

    load   starts a flight and returns its future; never blocks
    place  copies a packed adapter into the pool, or returns None when blocks are short
    remove gives a resident adapter's blocks back
    size   blocks that it would give back
    clock  seconds, for the time that loads take: from the start of a flight until `poll` takes it in
    """

    def __init__(
        self,
        *,
        host_bytes: int,
        load: Callable[[AdapterRef], Future[P]],
        place: Callable[[AdapterRef, P], R | None],
        remove: Callable[[R], None],
        size: Callable[[R], float] = lambda resident: 1.0,
        usage: UsageLog | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._host: HostMemory[P] = HostMemory(host_bytes)
        self.table: AdapterTable[P, R] = AdapterTable(self._host, usage or UsageLog())
        self.counts = ResidencyCounts()
        self.load_seconds = Histogram(METRICS["adapter_load_seconds"].buckets)
        self._now = clock
        self._load, self._place, self._remove, self._size = load, place, remove, size
        self._eviction = GreedyDual()
        self._settled: dict[str, None] = {}

    # -- what requests do ---------------------------------------------------------------------------------------------

    def want(self, ref: AdapterRef, *, again: bool = False) -> None:
        """A request that needs `ref` waits. Undone by `unwant`, once. `again`: it was preempted, and counts no more."""
        entry = self.table.entries.get(ref.digest)
        if not again:
            tier = None if entry is None else entry.tier
            self.counts.pool_hits += tier is Tier.POOL
            self.counts.host_hits += tier is Tier.HOST
            self.counts.misses += tier not in (Tier.POOL, Tier.HOST)
            self.table.usage.asked(ref)
        if entry is None:
            entry = self.table.entries[ref.digest] = Entry(ref, Tier.LOADING)
            self.table.queued[ref.digest] = entry
        self.table.touch(entry)
        entry.wants.append(entry.last_used)
        self.table.changed(entry)

    def unwant(self, ref: AdapterRef) -> None:
        entry = self.table.entries[ref.digest]
        entry.wants.popleft()
        self.table.changed(entry)
        if entry.wants:
            return
        if entry.tier is Tier.FAILED:
            self._forget_failed(entry)
        elif entry.tier is Tier.LOADING and (entry.flight is None or entry.flight.cancel()):
            # Nobody waits for it any more. A flight that is under way already lands in the host's cache.
            self.table.queued.pop(ref.digest, None)
            if self.table.flying.pop(ref.digest, None) is not None:
                self._host.expect_no_more(ref.nbytes)
            self.table.forget(entry)

    def acquire(self, ref: AdapterRef) -> R | None:
        """Pin `ref` in the pool, copying it there first if need be.

        None while blocks are short or it is not loaded, or where it cannot be placed: then its tier is FAILED.
        """
        entry = self.table.entries[ref.digest]
        if entry.tier is Tier.HOST:
            assert entry.packed is not None
            began = self._now()
            try:
                entry.resident = self._place(ref, entry.packed)
            except Exception as e:  # noqa: BLE001 - whatever is wrong with this adapter concerns its requests alone
                self._drop_packed(entry)
                self._fail(entry, e)
                return None
            if entry.resident is None:
                return None
            entry.tier = Tier.POOL
            seconds = None if entry.is_arriving else self._now() - began
            self._eviction.placed(entry.worth, seconds, self._size(entry.resident))
        if entry.tier is not Tier.POOL:
            return None
        entry.pins += 1
        self._eviction.used(entry.worth)
        self.table.touch(entry)
        self.table.changed(entry)
        return entry.resident

    def release(self, ref: AdapterRef) -> None:
        entry = self.table.entries[ref.digest]
        assert entry.pins > 0
        entry.pins -= 1
        self._eviction.left(entry.worth)
        self.table.changed(entry)
        if entry.tier is Tier.FAILED:
            self._forget_failed(entry)

    # -- what the engine does -----------------------------------------------------------------------------------------

    def poll(self) -> bool:
        """Take in flights that have landed and start those that fit the host, in order; True if anything landed."""
        landed = [entry for entry in self.table.flying.values() if entry.flight is not None and entry.flight.done()]
        for entry in landed:
            self._land(entry)
        whole = [entry for entry in self.table.arriving.values() if not entry.is_arriving]
        for entry in whole:
            self._end_flight(entry)
        self._drop(self._host.surplus())
        while self.table.queued:
            entry = next(iter(self.table.queued.values()))
            going = self._host.room_for(entry.ref.nbytes, self.table.asked_for_after(entry))
            if going is None:
                break
            self._drop(going)
            del self.table.queued[entry.ref.digest]
            self.table.flying[entry.ref.digest] = entry
            self._host.expect(entry.ref.nbytes)
            self.counts.loads += 1
            entry.flight_began = self._now()
            entry.flight = self._load(entry.ref)
        return bool(landed or whole)

    def take_settled(self) -> Collection[str]:
        """Digests of adapters that have landed, become whole or failed since this was last asked for."""
        settled, self._settled = self._settled, {}
        return settled

    def evict_one(self) -> bool:
        """Give back the blocks of the idle adapter that is worth least, see `eviction`; False if all are pinned.

        Those that waiting requests want go last.
        """
        if not self.table.idle:
            return False
        entry = min(self.table.idle.values(), key=lambda e: (bool(e.wants), self._value(e), e.last_used))
        assert entry.resident is not None
        if not entry.wants:
            self._eviction.evicted(self._value(entry))
        self._remove(entry.resident)
        entry.resident = None
        self.counts.evictions += 1
        if entry.packed is not None:
            entry.tier = Tier.HOST
            self.table.changed(entry)
        else:
            self._gone(entry)
        return True

    # -- inside -------------------------------------------------------------------------------------------------------

    def _value(self, entry: Entry[P, R]) -> float:
        assert entry.resident is not None
        return self._eviction.value(entry.worth, self._size(entry.resident), on_host=entry.packed is not None)

    def _land(self, entry: Entry[P, R]) -> None:
        assert entry.flight is not None
        del self.table.flying[entry.ref.digest]
        self._host.expect_no_more(entry.ref.nbytes)
        flight, entry.flight = entry.flight, None
        error = flight.exception()
        if error is not None:
            self._fail(entry, error)
            return
        entry.packed, entry.tier = flight.result(), Tier.HOST
        self._host.keep(entry.ref.digest, entry.packed)
        self.table.arriving[entry.ref.digest] = entry
        self._settled[entry.ref.digest] = None
        if entry.is_arriving:
            self.table.changed(entry)
        else:
            self._end_flight(entry)

    def _end_flight(self, entry: Entry[P, R]) -> None:
        """All of it has come, or never will."""
        assert entry.packed is not None
        del self.table.arriving[entry.ref.digest]
        self._settled[entry.ref.digest] = None
        arrival = entry.packed.arrival
        if arrival is not None:
            arrival.late = False
        if arrival is not None and arrival.error is not None:
            self._drop_packed(entry)
            self._fail(entry, arrival.error)
        else:
            self.counts.loaded_bytes += entry.packed.nbytes
            entry.worth.load_seconds = self._now() - entry.flight_began
            self.load_seconds.observe(entry.worth.load_seconds)
            self.table.changed(entry)

    def _fail(self, entry: Entry[P, R], error: BaseException) -> None:
        self.counts.failed_loads += 1
        entry.tier = Tier.FAILED
        entry.error = error if isinstance(error, Exception) else EngineError(f"loading {entry.ref.label}: {error!r}")
        self._settled[entry.ref.digest] = None
        self.table.changed(entry)
        self._forget_failed(entry)

    def _forget_failed(self, entry: Entry[P, R]) -> None:
        """Once nobody runs on it its blocks go back, and once nobody waits for it either it may be tried again."""
        if entry.pins:
            return
        if entry.resident is not None:
            self._remove(entry.resident)
            entry.resident = None
        if not entry.wants:
            self.table.forget(entry)

    def _drop(self, digests: Iterable[str]) -> None:
        """Their copies on the host."""
        for digest in digests:
            entry = self.table.entries[digest]
            self._drop_packed(entry)
            self.counts.host_evictions += 1
            if entry.tier is Tier.HOST:
                self._gone(entry)

    def _drop_packed(self, entry: Entry[P, R]) -> None:
        self.table.arriving.pop(entry.ref.digest, None)
        self._host.drop(entry.ref.digest)
        entry.packed = None

    def _gone(self, entry: Entry[P, R]) -> None:
        """Neither in the pool nor on the host any more: it flies again if it is wanted, behind those that wait."""
        if entry.wants:
            entry.tier = Tier.LOADING
            self.table.queued[entry.ref.digest] = entry
            self.table.changed(entry)
        else:
            self.table.forget(entry)
