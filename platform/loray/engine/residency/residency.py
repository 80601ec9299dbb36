"""How adapters move: from the store to host memory, into the pool and back. The only owner of where they are.

    absent → LOADING → HOST ⇄ POOL        a failed load fails the requests that need it; see `backoff`

An adapter may be usable, on the host or in the pool, before it is complete. If a step has waited for the rest of it in
vain, it is LOADING again until it is complete.
A load runs in another thread and never blocks the engine; there is one load per adapter, however many requests wait for
it. An adapter is pinned in the pool while a request that uses it runs. Afterwards it stays there, idle, until its
blocks are needed.

Loads start in the order in which they were requested, as far as host memory allows. For a load, copies are dropped that
no request waits for, least recently used first; then copies for which only requests wait that came later than those
that wait for the load. So small adapters in demand cannot keep a large one out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from typing import Generic

from loray.engine.memory.worth import Floor
from loray.engine.residency.backoff import Backoff
from loray.engine.residency.eviction import AdapterWorth
from loray.engine.residency.host import HostMemory
from loray.engine.residency.loads import StartedLoads
from loray.engine.residency.table import AdapterTable, Entry, P, R, Stage, Tier
from loray.engine.stats.histogram import Histogram
from loray.engine.stats.usage import ResidencyCounts, UsageLog
from loray.errors import EngineError
from loray.spec import AdapterRef
from loray.telemetry import METRICS


class Residency(Generic[P, R]):
    """Called from the engine's thread only. Others may read its `table`.

    load    starts a load and returns its future; never blocks
    place   copies a packed adapter into the pool, or returns None when blocks are short
    remove  frees a resident adapter's blocks
    size    blocks that `remove` would free
    arrived whether steps read a resident adapter's rows without waiting for their copy
    wake    called in the loader's thread when a load has a result
    clock   seconds, to measure loads: from the start until `poll` finds the adapter complete
    """

    def __init__(
        self,
        *,
        host_bytes: int,
        load: Callable[[AdapterRef], Future[P]],
        place: Callable[[AdapterRef, P], R | None],
        remove: Callable[[R], None],
        size: Callable[[R], float] = lambda resident: 1.0,
        arrived: Callable[[R], bool] = lambda resident: True,
        usage: UsageLog | None = None,
        wake: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        backoff: Backoff | None = None,
    ) -> None:
        self._host: HostMemory[P] = HostMemory(host_bytes)
        self.table: AdapterTable[P, R] = AdapterTable(self._host, usage or UsageLog(), self._value)
        self.counts = ResidencyCounts()
        self.load_seconds = Histogram(METRICS["adapter_load_seconds"].buckets)
        self._now, self.size = clock, size
        self._loads: StartedLoads[P, R] = StartedLoads(load, wake, clock)
        self._worth = AdapterWorth()
        self._place, self._remove, self._arrived = place, remove, arrived
        self._backoff = backoff or Backoff(clock)

    @property
    def floor(self) -> Floor:
        """Of the pool's blocks. Whatever else competes for them shares it."""
        return self._worth.floor

    @property
    def least_value(self) -> float | None:
        """Of the adapter that `evict_one` would evict; infinite if a request waits for it, None if all are pinned."""
        least = self.table.idle.peek()
        return None if least is None else least[0][0]

    # -- for requests -------------------------------------------------------------------------------------------------

    def want(self, ref: AdapterRef, *, again: bool = False) -> None:
        """A request that needs `ref` waits, until `unwant` is called, once. `again`: the request was preempted, and is
        not counted.
        """
        entry = self.table.entries.get(ref.digest)
        if not again:
            tier = None if entry is None else entry.tier
            self.counts.num_pool_hits += tier is Tier.POOL
            self.counts.num_host_hits += tier is Tier.HOST
            self.counts.num_misses += tier not in (Tier.POOL, Tier.HOST)
            self.table.usage.request_came(ref)
        if entry is None:
            entry = self.table.add(ref, self._backoff.error(ref.digest))
        self.table.touch(entry)
        entry.wants.append(entry.last_used)
        self.table.update(entry)

    def unwant(self, ref: AdapterRef) -> None:
        entry = self.table.entries[ref.digest]
        entry.wants.popleft()
        self.table.update(entry)
        if entry.wants:
            return
        if entry.tier is Tier.FAILED:
            self._forget_failed(entry)
        elif entry.stage is Stage.QUEUED or (entry.stage is Stage.LOADING and self._loads.cancel(entry)):
            # No request waits any more. A load that already runs goes on, and the host keeps its result.
            self.table.forget(entry)

    def acquire(self, ref: AdapterRef) -> R | None:
        """Pin `ref` in the pool; first copy it there if it is on the host.

        None while blocks are short or it is on its way, and if it cannot be placed: then its tier is FAILED.
        """
        entry = self.table.entries[ref.digest]
        self._to_pool(entry)
        if entry.stage is not Stage.POOL:
            return None
        entry.pins += 1
        self._worth.used(entry.score)
        self.table.touch(entry)
        self.table.update(entry)
        return entry.resident

    def place_ahead(self, ref: AdapterRef) -> bool:
        """Copy `ref` into the pool if it is complete on the host and blocks suffice. Whether that was done."""
        entry = self.table.entries[ref.digest]
        return entry.tier is Tier.HOST and not entry.is_partial and self._to_pool(entry)

    def release(self, ref: AdapterRef) -> None:
        entry = self.table.entries[ref.digest]
        assert entry.pins > 0
        entry.pins -= 1
        self._worth.released(entry.score)
        self.table.update(entry)
        if entry.tier is Tier.FAILED:
            self._forget_failed(entry)

    # -- for the engine -----------------------------------------------------------------------------------------------

    def poll(self, *, at_once: bool = False) -> bool:
        """Take the results of loads, and start queued loads that fit the host, in order; True if there was a result,
        a partial adapter is done, or an adapter's rows have arrived.

        `at_once`: no step runs that a copy could hold up, so the next one may wait for the rows that are on their way.
        """
        arriving = self.table.at[Stage.ARRIVING].values()
        arrived = [e for e in arriving if at_once or (e.resident is not None and self._arrived(e.resident))]
        for entry in arrived:
            self.table.move(entry, Stage.POOL)
        changed = bool(arrived)
        for entry, load in self._loads.ended():
            self._take_result(entry, load)
            changed = True
        for entry in [entry for entry in self.table.partial.values() if not entry.is_partial]:
            self._end_load(entry)
            changed = True
        self._drop(self._host.surplus())
        queued = self.table.at[Stage.QUEUED]
        while queued:
            entry = next(iter(queued.values()))
            victims = self._host.room_for(entry.ref.digest, entry.ref.nbytes, entry.wants[0])
            if victims is None:
                break
            self._drop(victims)
            self.counts.num_loads += 1
            self._loads.start(entry)
            self.table.move(entry, Stage.LOADING)
        return changed

    def take_changed(self) -> Collection[str]:
        """Digests of the adapters whose tier has changed since the last call: those who wait for them look again."""
        return self.table.take_changed()

    def evict_one(self) -> bool:
        """Free the blocks of the idle adapter with the lowest value, see `eviction`; False if all are pinned.

        Adapters for which requests wait are evicted last.
        """
        least = self.table.idle.peek()
        if least is None:
            return False
        (value, _), digest = least
        entry = self.table.entries[digest]
        if not entry.wants:
            self.floor.evicted(value)
        self._from_pool(entry)
        self.counts.num_evictions += 1
        if entry.packed is not None:
            self.table.move(entry, Stage.HOST)
        else:
            self._requeue_or_forget(entry)
        return True

    # -- private ------------------------------------------------------------------------------------------------------

    def _value(self, entry: Entry[P, R]) -> float:
        assert entry.resident is not None
        return self._worth.value(entry.score, self.size(entry.resident), on_host=entry.packed is not None)

    def _to_pool(self, entry: Entry[P, R]) -> bool:
        """From the host; True if that was done."""
        if entry.tier is not Tier.HOST:
            return False
        assert entry.packed is not None
        began = self._now()
        try:
            entry.resident = self._place(entry.ref, entry.packed)
        except Exception as e:  # noqa: BLE001 - the error is the adapter's: it fails its requests, not the engine
            self.table.drop_packed(entry)
            self._fail(entry, e)
            return False
        if entry.resident is None:
            return False
        seconds = None if entry.is_partial else self._now() - began
        self._worth.placed(entry.score, seconds, self.size(entry.resident))
        self.table.move(entry, Stage.POOL if self._arrived(entry.resident) else Stage.ARRIVING)
        return True

    def _from_pool(self, entry: Entry[P, R]) -> None:
        assert entry.resident is not None
        self._remove(entry.resident)
        entry.resident = None

    def _take_result(self, entry: Entry[P, R], load: Future[P]) -> None:
        """Of a load that has ended: an adapter, perhaps a partial one, or an error."""
        error = load.exception()
        if error is not None:
            self._fail(entry, error)
            return
        self.table.put_on_host(entry, load.result())
        if not entry.is_partial:
            self._end_load(entry)

    def _end_load(self, entry: Entry[P, R]) -> None:
        """The adapter is complete, or has failed after it became usable."""
        assert entry.packed is not None
        error = None if entry.packed.partial is None else entry.packed.partial.error
        if error is None:
            self.counts.num_loaded_bytes += entry.packed.nbytes
            entry.score.load_seconds = self._now() - entry.load_began
            self.load_seconds.observe(entry.score.load_seconds)
            self._backoff.succeeded(entry.ref.digest)
        self.table.end_partial(entry)
        if error is not None:
            self.table.drop_packed(entry)
            self._fail(entry, error)

    def _fail(self, entry: Entry[P, R], error: BaseException) -> None:
        self.counts.num_failed_loads += 1
        entry.error = error if isinstance(error, Exception) else EngineError(f"loading {entry.ref.label}: {error!r}")
        entry.error = self._backoff.failed(entry.ref.digest, entry.error)
        self.table.move(entry, Stage.FAILED)
        self._forget_failed(entry)

    def _forget_failed(self, entry: Entry[P, R]) -> None:
        """Free its blocks unless a running request uses it, and forget it unless a request waits."""
        if entry.pins:
            return
        if entry.resident is not None:
            self._from_pool(entry)
        if not entry.wants:
            self.table.forget(entry)

    def _drop(self, digests: Iterable[str]) -> None:
        """Drop their copies on the host."""
        for digest in digests:
            entry = self.table.entries[digest]
            self.table.drop_packed(entry)
            self.counts.num_host_evictions += 1
            if entry.tier is Tier.HOST:
                self._requeue_or_forget(entry)
            else:
                self.table.update(entry)

    def _requeue_or_forget(self, entry: Entry[P, R]) -> None:
        """It is neither in the pool nor on the host any more. If a request waits, it is loaded again, after the queued
        ones.
        """
        if entry.wants:
            self.table.move(entry, Stage.QUEUED)
        else:
            self.table.forget(entry)
