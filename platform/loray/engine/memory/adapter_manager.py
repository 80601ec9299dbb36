"""`AdapterManager` brings adapters from the store to the host and from there into the pool, and keeps those in use.

    absent → LOADING → HOST ⇄ POOL        a failed load fails the requests that need it; see `Backoff`

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

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Generic, NamedTuple, TypeVar

from loray.engine.memory.eviction import EvictionPolicy, EvictionScore, Inflation, PriorityQueue
from loray.engine.memory.host_memory import HostMemory, P
from loray.engine.metrics import AdapterUsageLog, Histogram, ResidencyCounts
from loray.errors import EngineError, IntegrityError, StoreError, UnsupportedError
from loray.spec import AdapterRef
from loray.telemetry import METRICS

R = TypeVar("R")

_FIRST_S, _LAST_S = 1.0, 60.0
_FIRST_LASTING_S, _LAST_LASTING_S = 60.0, 600.0  # bytes under a digest do not change; a cache's or a store's copy may
_LASTING = (IntegrityError, UnsupportedError)
_NUM_FAILURES = 10_000  # that are remembered


class _Failure(NamedTuple):
    error: Exception
    num_failures: int
    until: float


class Backoff:
    """The last error of each digest, and until when it stands. The time doubles with every failure that follows.

    A load that fails because the store does is tried again after 1 s, at last after 60 s; one whose bytes are damaged
    or cannot be served after 60 s, at last after 600 s. An adapter that nobody asked for until ten minutes after that
    begins anew. `clock`: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._failures: OrderedDict[str, _Failure] = OrderedDict()

    def failed(self, digest: str, error: Exception) -> Exception:
        """The load has failed; returns the error of the requests that wait for it, see `error`."""
        now, last = self._clock(), self._failures.pop(digest, None)
        num_failures = 1 if last is None or now > last.until + _LAST_LASTING_S else last.num_failures + 1
        first, most = (_FIRST_LASTING_S, _LAST_LASTING_S) if isinstance(error, _LASTING) else (_FIRST_S, _LAST_S)
        seconds = min(most, first * 2.0 ** min(num_failures - 1, 16))
        self._failures[digest] = _Failure(error, num_failures, now + seconds)
        if len(self._failures) > _NUM_FAILURES:
            self._failures.popitem(last=False)
        return self.error(digest) or error

    def succeeded(self, digest: str) -> None:
        self._failures.pop(digest, None)

    def error(self, digest: str) -> Exception | None:
        """The error of a request that comes now; None if the adapter may be loaded. A StoreError says when to try
        again.
        """
        failure = self._failures.get(digest)
        left = 0.0 if failure is None else failure.until - self._clock()
        if failure is None or left <= 0:
            return None
        if isinstance(failure.error, StoreError):
            error = StoreError(f"{failure.error}; it is tried again in {left:.1f} s", left)
            error.__cause__ = failure.error
            return error
        return failure.error


class Tier(Enum):
    LOADING = "loading"
    HOST = "host"
    POOL = "pool"
    FAILED = "failed"


class Stage(Enum):
    """Where an adapter is, more exactly than its tier. COPYING: it has blocks of the pool, its rows are on their way
    there, and no request has started with it.
    """

    QUEUED = 1, Tier.LOADING
    LOADING = 2, Tier.LOADING
    HOST = 3, Tier.HOST
    COPYING = 4, Tier.POOL
    POOL = 5, Tier.POOL
    FAILED = 6, Tier.FAILED

    def __init__(self, number: int, tier: Tier) -> None:
        self.tier = tier


class Placement(NamedTuple):
    """Where an adapter is and how it has been used. `tier` None: neither in the pool nor on the host nor loading.
    `last_used_at`: seconds since the epoch.
    """

    ref: AdapterRef
    tier: Tier | None
    num_uses: int
    last_used_at: float
    num_tokens: int


@dataclass(slots=True)
class Entry(Generic[P, R]):
    """One adapter. Only the table writes `stage` and `packed`.

    load     None before the load starts and after its result has been taken
    pins     running requests that use the adapter
    waiters  when the waiting requests came, by the table's clock; a request that leaves removes the first
    """

    ref: AdapterRef
    stage: Stage
    load: Future[P] | None = None
    load_began: float = 0.0
    packed: P | None = None
    resident: R | None = None
    error: Exception | None = None
    pins: int = 0
    waiters: deque[int] = field(default_factory=deque)
    last_used: int = 0
    score: EvictionScore = field(default_factory=EvictionScore)

    @property
    def tier(self) -> Tier:
        return self.stage.tier

    @property
    def is_partial(self) -> bool:
        """The adapter is usable, but not complete yet."""
        partial = None if self.packed is None else self.packed.partial
        return partial is not None and not partial.done


class AdapterTable(Generic[P, R]):
    """All adapters by digest, with indexes of those in certain states. It owns the stage of each adapter, and the list
    of those whose requests are to be told, since an adapter that moves untold lets its requests wait for ever: both
    change together. Only AdapterManager calls what changes it.

    Nothing that is called for a request or a step visits all entries, however many there are.
    """

    def __init__(
        self, host: HostMemory[P], usage: AdapterUsageLog, value: Callable[[Entry[P, R]], float] = lambda entry: 0.0
    ) -> None:
        """`value`: of an idle adapter, see `EvictionPolicy`; taken when the entry was last changed."""
        self.usage = usage
        self._host = host
        self._value = value
        self.entries: dict[str, Entry[P, R]] = {}
        self.at: dict[Stage, OrderedDict[str, Entry[P, R]]] = {stage: OrderedDict() for stage in Stage}
        self.partial: dict[str, Entry[P, R]] = {}  # on the host, and not complete when last looked at
        self._changed: dict[str, None] = {}
        # In the pool, and no running request uses it; the first is evicted first: the lowest value, then what was not
        # used for longest; those for which requests wait come last.
        self.idle: PriorityQueue[str] = PriorityQueue()
        self._clock = 0

    # -- reading ------------------------------------------------------------------------------------------------------

    def tier(self, ref: AdapterRef) -> Tier:
        """The tier, which is LOADING also for a partial adapter that is late: no step waits for it, though it may be in
        the pool, and pinned. So it is for one whose rows are on their way to the pool.
        """
        return self._tier(self.entries[ref.digest])

    def error(self, ref: AdapterRef) -> Exception:
        error = self.entries[ref.digest].error
        assert error is not None
        return error

    def resident(self, ref: AdapterRef) -> R:
        resident = self.entries[ref.digest].resident
        assert resident is not None
        return resident

    def pins(self) -> dict[str, int]:
        return {digest: e.pins for digest, e in self.entries.items() if e.pins}

    def waiters(self) -> dict[str, int]:
        return {digest: len(e.waiters) for digest, e in self.entries.items() if e.waiters}

    def residents(self) -> list[R]:
        return [e.resident for e in self.entries.values() if e.resident is not None]

    def by_tier(self) -> dict[Tier, list[AdapterRef]]:
        tiers: dict[Tier, list[AdapterRef]] = {tier: [] for tier in Tier}
        for entry in self.entries.values():
            tiers[entry.tier].append(entry.ref)
        return tiers

    def placements(self, digests: Collection[str] | None = None) -> list[Placement]:
        """Return where these adapters are, or all that are known; one that was never requested is left out."""
        known = self.usage.all() if digests is None else filter(None, map(self.usage.get, digests))
        found = []
        for usage in known:
            entry = self.entries.get(usage.ref.digest)
            tier = None if entry is None or entry.tier is Tier.FAILED else entry.tier
            found.append(Placement(usage.ref, tier, usage.num_uses, usage.last_used_at, usage.num_tokens))
        return found

    @property
    def has_changed(self) -> bool:
        """True if `take_changed` has something to tell."""
        return bool(self._changed)

    def take_changed(self) -> Collection[str]:
        """Return the adapters whose `tier` has changed since the last call: those who wait for them look again."""
        changed, self._changed = self._changed, {}
        return changed

    @property
    def host_used(self) -> int:
        """Bytes of adapters in host memory, see `HostMemory`."""
        return self._host.used

    def check_integrity(self) -> None:
        """Raise AssertionError unless every index holds exactly its entries, and the host's bytes are counted."""
        entries = self.entries.values()
        for stage, there in self.at.items():
            assert there == {digest: e for digest, e in self.entries.items() if e.stage is stage}
        assert all(self.entries[digest].packed is not None for digest in self.partial)
        for e in entries:
            in_pool = e.tier is Tier.POOL
            assert e.resident is not None if in_pool else e.resident is None or (e.tier is Tier.FAILED and e.pins)
            assert e.packed is not None if e.tier is Tier.HOST else e.packed is None or in_pool
            assert not e.pins or e.stage in (Stage.POOL, Stage.FAILED)
            assert (e.load is not None) is (e.stage is Stage.LOADING)
        assert self.idle.items() == {e.ref.digest for e in entries if e.tier is Tier.POOL and not e.pins}
        removable = {e.ref.digest: self._removable(e) for e in entries if e.packed is not None}
        self._host.check_integrity(sum(e.ref.nbytes for e in self.at[Stage.LOADING].values()), removable)

    # -- changing it --------------------------------------------------------------------------------------------------

    def add(self, ref: AdapterRef, error: Exception | None) -> Entry[P, R]:
        """Add an adapter whose load is queued, or has failed with `error`."""
        entry: Entry[P, R] = Entry(ref, Stage.QUEUED if error is None else Stage.FAILED, error=error)
        self.entries[ref.digest] = self.at[entry.stage][ref.digest] = entry
        return entry

    def move(self, entry: Entry[P, R], stage: Stage) -> None:
        """The adapter has got to another stage; its copies are what they are there."""
        digest, before = entry.ref.digest, self._tier(entry)
        del self.at[entry.stage][digest]
        if entry.stage is Stage.LOADING:
            self._host.end_reservation(entry.ref.nbytes)
        entry.stage = stage
        self.at[stage][digest] = entry
        if stage is Stage.LOADING:
            self._host.reserve(entry.ref.nbytes)
        self.update(entry)
        self._tell(entry, before)

    def put_on_host(self, entry: Entry[P, R], packed: P) -> None:
        """A load has brought `packed`, which is partial until `end_partial` is called."""
        entry.packed = packed
        self._host.add(entry.ref.digest, packed)
        self.partial[entry.ref.digest] = entry
        self.move(entry, Stage.HOST)

    def end_partial(self, entry: Entry[P, R]) -> None:
        """The copy on the host is complete or has failed; it is late no more."""
        assert entry.packed is not None
        before = self._tier(entry)
        del self.partial[entry.ref.digest]
        if entry.packed.partial is not None:
            entry.packed.partial.late = False
        self.update(entry)
        self._tell(entry, before)

    def drop_packed(self, entry: Entry[P, R]) -> None:
        """The copy on the host is dropped. An adapter that is not in the pool moves or is forgotten next."""
        self.partial.pop(entry.ref.digest, None)
        self._host.drop(entry.ref.digest)
        entry.packed = None

    def forget(self, entry: Entry[P, R]) -> None:
        """The adapter is neither in the pool nor on the host nor loading, and no request waits."""
        del self.entries[entry.ref.digest], self.at[entry.stage][entry.ref.digest]
        if entry.stage is Stage.LOADING:
            self._host.end_reservation(entry.ref.nbytes)
        self.idle.discard(entry.ref.digest)
        self.usage.dropped(entry.ref)

    def touch(self, entry: Entry[P, R]) -> None:
        self._clock += 1
        entry.last_used = self._clock
        self._host.touch(entry.ref.digest)

    def update(self, entry: Entry[P, R]) -> None:
        """Its waiters, its pins or its copy on the host have changed."""
        digest = entry.ref.digest
        if entry.tier is Tier.POOL and not entry.pins:
            value = math.inf if entry.waiters else self._value(entry)
            self.idle.set(digest, (value, entry.last_used))
        else:
            self.idle.discard(digest)
        self._host.set_removable(digest, self._removable(entry))

    # -- private ------------------------------------------------------------------------------------------------------

    def _tier(self, entry: Entry[P, R]) -> Tier:
        if entry.stage is Stage.COPYING:
            return Tier.LOADING
        partial = None if entry.packed is None else entry.packed.partial
        return Tier.LOADING if partial is not None and partial.late else entry.tier

    def _tell(self, entry: Entry[P, R], before: Tier) -> None:
        if self._tier(entry) is not before:
            self._changed[entry.ref.digest] = None

    def _removable(self, entry: Entry[P, R]) -> float | None:
        """When the first request came that waits for the copy on the host, infinite without one. None: there is no
        copy, or it is not complete.
        """
        if entry.packed is None or entry.ref.digest in self.partial:
            return None
        return entry.waiters[0] if entry.tier is Tier.HOST and entry.waiters else math.inf


class AdapterManager(Generic[P, R]):
    """The only owner of `table`. It is called from the engine's thread only; others may read its table.

    load          starts a load and returns its future; never blocks
    place         copies a packed adapter into the pool, or returns None when blocks are short
    remove        frees a resident adapter's blocks
    size          blocks that `remove` would free
    copy_is_done  whether steps read a resident adapter's rows without waiting for their copy
    wake          called in the loader's thread when a load has a result
    clock         seconds, to measure loads: from the start until `poll` finds the adapter complete
    """

    def __init__(
        self,
        *,
        host_bytes: int,
        load: Callable[[AdapterRef], Future[P]],
        place: Callable[[AdapterRef, P], R | None],
        remove: Callable[[R], None],
        size: Callable[[R], float] = lambda resident: 1.0,
        copy_is_done: Callable[[R], bool] = lambda resident: True,
        usage: AdapterUsageLog | None = None,
        wake: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        backoff: Backoff | None = None,
    ) -> None:
        self._host: HostMemory[P] = HostMemory(host_bytes)
        self.table: AdapterTable[P, R] = AdapterTable(self._host, usage or AdapterUsageLog(), self._value)
        self.counts = ResidencyCounts()
        self.load_seconds = Histogram(METRICS["adapter_load_seconds"].buckets)
        self._load, self._wake, self._now = load, wake, clock
        self._ended: deque[tuple[Entry[P, R], Future[P]]] = deque()  # added by the loaders' threads
        self._eviction = EvictionPolicy()
        self._place, self._remove, self.size, self._copy_is_done = place, remove, size, copy_is_done
        self._backoff = backoff or Backoff(clock)

    @property
    def inflation(self) -> Inflation:
        """The inflation of the pool's blocks. Whatever else competes for them shares it."""
        return self._eviction.inflation

    @property
    def least_value(self) -> float | None:
        """The value of what `evict_one` would evict; infinite if a request waits for it, None if all are pinned."""
        least = self.table.idle.peek()
        return None if least is None else least[0][0]

    # -- for requests -------------------------------------------------------------------------------------------------

    def add_waiter(self, ref: AdapterRef, *, again: bool = False) -> None:
        """A request waits for `ref` until `remove_waiter` is called, once. `again`: the request was preempted, and is
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
        entry.waiters.append(entry.last_used)
        self.table.update(entry)

    def remove_waiter(self, ref: AdapterRef) -> None:
        entry = self.table.entries[ref.digest]
        entry.waiters.popleft()
        self.table.update(entry)
        if entry.waiters:
            return
        if entry.tier is Tier.FAILED:
            self._forget_failed(entry)
        elif entry.stage is Stage.QUEUED or (entry.load is not None and entry.load.cancel()):
            # No request waits any more. A load that already runs goes on, and the host keeps its result.
            entry.load = None
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
        self._eviction.used(entry.score)
        self.table.touch(entry)
        self.table.update(entry)
        return entry.resident

    def place_ahead(self, ref: AdapterRef) -> bool:
        """Copy `ref` into the pool if it is complete on the host and blocks suffice; True if that was done."""
        entry = self.table.entries[ref.digest]
        return entry.tier is Tier.HOST and not entry.is_partial and self._to_pool(entry)

    def release(self, ref: AdapterRef) -> None:
        entry = self.table.entries[ref.digest]
        assert entry.pins > 0
        entry.pins -= 1
        self._eviction.released(entry.score)
        self.table.update(entry)
        if entry.tier is Tier.FAILED:
            self._forget_failed(entry)

    # -- for the engine -----------------------------------------------------------------------------------------------

    def poll(self, *, at_once: bool = False) -> bool:
        """Take the results of loads, and start queued loads that fit the host, in order; True if there was a result,
        a partial adapter is done, or an adapter's rows have been copied.

        `at_once`: no step runs that a copy could hold up, so the next one may wait for the rows that are on their way.
        """
        copying = self.table.at[Stage.COPYING].values()
        copied = [e for e in copying if at_once or (e.resident is not None and self._copy_is_done(e.resident))]
        for entry in copied:
            self.table.move(entry, Stage.POOL)
        changed = bool(copied)
        while self._ended:
            entry, load = self._ended.popleft()
            if entry.load is load:  # it was not cancelled
                entry.load = None
                self._take_result(entry, load)
                changed = True
        for entry in [entry for entry in self.table.partial.values() if not entry.is_partial]:
            self._end_load(entry)
            changed = True
        self._drop(self._host.surplus())
        queued = self.table.at[Stage.QUEUED]
        while queued:
            entry = next(iter(queued.values()))
            victims = self._host.room_for(entry.ref.digest, entry.ref.nbytes, entry.waiters[0])
            if victims is None:
                break
            self._drop(victims)
            self.counts.num_loads += 1
            entry.load_began = self._now()
            entry.load = self._load(entry.ref)
            entry.load.add_done_callback(partial(self._load_ended, entry))
            self.table.move(entry, Stage.LOADING)
        return changed

    def evict_one(self) -> bool:
        """Free the blocks of the idle adapter with the lowest value, see `EvictionPolicy`; False if all are pinned.

        Adapters for which requests wait are evicted last.
        """
        least = self.table.idle.peek()
        if least is None:
            return False
        (value, _), digest = least
        entry = self.table.entries[digest]
        if not entry.waiters:
            self.inflation.evicted(value)
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
        return self._eviction.value(entry.score, self.size(entry.resident), on_host=entry.packed is not None)

    def _load_ended(self, entry: Entry[P, R], load: Future[P]) -> None:
        """Called in the loader's thread."""
        self._ended.append((entry, load))
        self._wake()

    def _to_pool(self, entry: Entry[P, R]) -> bool:
        """Copy an adapter from the host into the pool; True if that was done."""
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
        self._eviction.placed(entry.score, seconds, self.size(entry.resident))
        self.table.move(entry, Stage.POOL if self._copy_is_done(entry.resident) else Stage.COPYING)
        return True

    def _from_pool(self, entry: Entry[P, R]) -> None:
        assert entry.resident is not None
        self._remove(entry.resident)
        entry.resident = None

    def _take_result(self, entry: Entry[P, R], load: Future[P]) -> None:
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
        if not entry.waiters:
            self.table.forget(entry)

    def _drop(self, digests: Iterable[str]) -> None:
        """Drop the copies on the host."""
        for digest in digests:
            entry = self.table.entries[digest]
            self.table.drop_packed(entry)
            self.counts.num_host_evictions += 1
            if entry.tier is Tier.HOST:
                self._requeue_or_forget(entry)
            else:
                self.table.update(entry)

    def _requeue_or_forget(self, entry: Entry[P, R]) -> None:
        """Load an adapter that is nowhere any more again, after the queued ones, if a request waits for it."""
        if entry.waiters:
            self.table.move(entry, Stage.QUEUED)
        else:
            self.table.forget(entry)
