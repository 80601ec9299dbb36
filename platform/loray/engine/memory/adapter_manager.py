"""`AdapterManager` brings adapters from the store to the host and from there into the pool, and keeps those in use.

    absent → QUEUED → LOADING → HOST → COPYING → POOL → HOST     a failed load fails the requests that need it

A load runs in another thread and never blocks the engine; there is one load per adapter, however many requests wait for
it, and it gives a complete adapter. An adapter is pinned in the pool while a request that uses it runs. Afterwards it
stays there, idle, until its blocks are needed.

Loads start in the order in which they were requested, as far as host memory allows. For a load, copies are dropped that
no request waits for, the lowest value first; then copies for which only requests wait that came later than those
that wait for the load. So small adapters in demand cannot keep a large one out.
"""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Generic, NamedTuple, TypeVar

from loray.engine.memory.eviction import EvictionPolicy, EvictionScore, Inflation, PriorityQueue
from loray.engine.memory.host_memory import HostMemory, P
from loray.engine.metrics import AdapterUsage, Histogram, ResidencyCounts
from loray.errors import AdapterGone, EngineError, IntegrityError, StoreError, UnsupportedError
from loray.spec import AdapterRef
from loray.telemetry import METRICS

R = TypeVar("R")

_FIRST_S, _LAST_S = 1.0, 60.0
_FIRST_LASTING_S, _LAST_LASTING_S = 60.0, 600.0  # bytes under a digest do not change; a cache's or a store's copy may
_LASTING = (IntegrityError, UnsupportedError)
_NUM_FAILURES = 10_000  # that are remembered
_NUM_USAGES = 10_000  # of adapters that are nowhere any more; some 15 MB


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
        """The load has failed; returns the error of the requests that wait for it, see `error`. A trainer that has gone
        may publish the adapter again at any time, and to look for it costs nothing.
        """
        if isinstance(error, AdapterGone):
            return error
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
    """Where an adapter is. COPYING: it has blocks of the pool, its rows are on their way there, and no request has
    started with it.

    place          what its status says
    is_on_its_way  whoever needs it waits
    """

    QUEUED = 1, "loading", True
    LOADING = 2, "loading", True
    HOST = 3, "host", False
    COPYING = 4, "pool", True
    POOL = 5, "pool", False
    FAILED = 6, "failed", False

    def __init__(self, number: int, place: str, is_on_its_way: bool) -> None:
        self.place, self.is_on_its_way = place, is_on_its_way


class Placement(NamedTuple):
    """Where an adapter is and how it has been used. `place` None: neither in the pool nor on the host nor loading.
    `last_used_at`: seconds since the epoch.
    """

    ref: AdapterRef
    place: str | None
    num_uses: int
    last_used_at: float
    num_tokens: int


@dataclass(slots=True)
class Entry(Generic[P, R]):
    """One adapter. Only AdapterManager writes it.

    load     None before the load starts and after its result has been taken
    pins     running requests that use the adapter
    waiters  when the waiting requests came, by the manager's clock; a request that leaves removes the first
    """

    ref: AdapterRef
    tier: Tier
    usage: AdapterUsage
    load: Future[P] | None = None
    load_began: float = 0.0
    packed: P | None = None
    resident: R | None = None
    error: Exception | None = None
    pins: int = 0
    waiters: deque[int] = field(default_factory=deque)
    last_used: int = 0
    score: EvictionScore = field(default_factory=EvictionScore)


class AdapterManager(Generic[P, R]):
    """The only owner of adapters' tiers, pins and waiters, and of the indexes of them, which others may read. It is
    called from the engine's thread only. Nothing that is called for a request or a step visits all entries.

    entries  all adapters by digest; at: those of each tier
    idle     in the pool, and no running request uses it; the first is evicted first: the lowest value, then what was
             not used for longest; those for which requests wait come last

    load          starts a load and returns its future; never blocks
    place         copies a packed adapter into the pool, or returns None when blocks are short
    remove        frees a resident adapter's blocks
    size          blocks that `remove` would free
    copy_is_done  whether steps read a resident adapter's rows without waiting for their copy
    wake          called in the loader's thread when a load has a result
    clock         seconds, to measure loads: from the start until `poll` finds the adapter complete
    date          seconds since the epoch
    num_usages    adapters that are nowhere any more whose usage is kept; those gone for longest are forgotten first
    on_forget     called with their digests
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
        wake: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
        date: Callable[[], float] = time.time,
        num_usages: int = _NUM_USAGES,
        on_forget: Callable[[str], None] = lambda digest: None,
        backoff: Backoff | None = None,
    ) -> None:
        self.entries: dict[str, Entry[P, R]] = {}
        self.at: dict[Tier, OrderedDict[str, Entry[P, R]]] = {tier: OrderedDict() for tier in Tier}
        self.idle: PriorityQueue[str] = PriorityQueue()
        self.counts = ResidencyCounts()
        self.load_seconds = Histogram(METRICS["adapter_load_seconds"].buckets)
        self.size = size
        self._changed: dict[str, None] = {}
        self._clock = 0
        self.host: HostMemory[P] = HostMemory(host_bytes)
        self._load, self._wake, self._now = load, wake, clock
        self._ended: deque[tuple[Entry[P, R], Future[P]]] = deque()  # added by the loaders' threads
        self._eviction = EvictionPolicy()
        self._place, self._remove, self._copy_is_done = place, remove, copy_is_done
        self._backoff = backoff or Backoff(clock)
        self._date, self._num_usages, self._on_forget = date, num_usages, on_forget
        self._gone: OrderedDict[str, AdapterUsage] = OrderedDict()  # usage of adapters that are nowhere any more

    # -- reading ------------------------------------------------------------------------------------------------------

    def tier(self, ref: AdapterRef) -> Tier:
        return self.entries[ref.digest].tier

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

    def placements(self, digests: Collection[str] | None = None) -> list[Placement]:
        """Return where these adapters are, or all that are known; one that was never requested is left out."""
        found = []
        for digest in [*self.entries, *self._gone] if digests is None else digests:
            entry = self.entries.get(digest)
            usage = self._gone.get(digest) if entry is None else entry.usage
            if usage is not None:
                place = None if entry is None or entry.tier is Tier.FAILED else entry.tier.place
                found.append(Placement(usage.ref, place, usage.num_uses, usage.last_used_at, usage.num_tokens))
        return found

    @property
    def has_changed(self) -> bool:
        """True if `take_changed` has something to tell."""
        return bool(self._changed)

    def take_changed(self) -> Collection[str]:
        """Return the adapters that have moved since the last call: those who wait for them look again."""
        changed, self._changed = self._changed, {}
        return changed

    @property
    def host_used(self) -> int:
        """Bytes of adapters and prefixes in host memory, see `HostMemory`."""
        return self.host.used

    @property
    def inflation(self) -> Inflation:
        """The inflation of the pool's blocks. Whatever else competes for them shares it."""
        return self._eviction.inflation

    @property
    def least_value(self) -> float | None:
        """The value of what `evict_one` would evict; infinite if a request waits for it, None if all are pinned."""
        least = self.idle.peek()
        return None if least is None else least[0][0]

    # -- for requests -------------------------------------------------------------------------------------------------

    def add_waiter(self, ref: AdapterRef, *, again: bool = False) -> None:
        """A request waits for `ref` until `remove_waiter` is called, once. `again`: the request was preempted, and is
        not counted.
        """
        entry = self.entries.get(ref.digest)
        if not again:
            place = None if entry is None else entry.tier.place
            self.counts.num_pool_hits += place == "pool"
            self.counts.num_host_hits += place == "host"
            self.counts.num_misses += place not in ("pool", "host")
        if entry is None:
            error, usage = self._backoff.error(ref.digest), self._gone.pop(ref.digest, None)
            tier = Tier.QUEUED if error is None else Tier.FAILED
            entry = Entry(ref, tier, usage or AdapterUsage(ref, self._date()), error=error)
            self.entries[ref.digest] = self.at[tier][ref.digest] = entry
        if not again:
            entry.usage.ref = ref  # the same bytes may be published under two names: the last one that was requested
            entry.usage.num_uses += 1
            entry.usage.last_used_at = self._date()
        self._touch(entry)
        entry.waiters.append(entry.last_used)
        self._update(entry)

    def remove_waiter(self, ref: AdapterRef) -> None:
        entry = self.entries[ref.digest]
        entry.waiters.popleft()
        self._update(entry)
        if entry.waiters:
            return
        if entry.tier in (Tier.FAILED, Tier.QUEUED) or (entry.load is not None and entry.load.cancel()):
            # No request waits any more. A load that already runs goes on, and the host keeps its result.
            entry.load = None
            self._set_tier(entry, None)

    def request_ended(self, ref: AdapterRef, num_tokens: int) -> None:
        """A request for `ref`, which it has not left yet, ended with or without an error."""
        usage = self.entries[ref.digest].usage
        usage.num_tokens += num_tokens
        usage.last_used_at = self._date()

    def acquire(self, ref: AdapterRef) -> R | None:
        """Pin `ref` in the pool; first copy it there if it is on the host.

        None while blocks are short or it is on its way, and if it cannot be placed: then its tier is FAILED.
        """
        entry = self.entries[ref.digest]
        self.place_ahead(ref)
        if entry.tier is not Tier.POOL:
            return None
        entry.pins += 1
        self._eviction.used(entry.score)
        self._touch(entry)
        self._update(entry)
        return entry.resident

    def place_ahead(self, ref: AdapterRef) -> bool:
        """Copy `ref` into the pool if it is on the host and blocks suffice; True if that was done."""
        entry = self.entries[ref.digest]
        if entry.tier is not Tier.HOST:
            return False
        assert entry.packed is not None
        began = self._now()
        try:
            entry.resident = self._place(ref, entry.packed)
        except Exception as e:  # noqa: BLE001 - the error is the adapter's: it fails its requests, not the engine
            self._drop_packed(entry)
            self._fail(entry, e)
            return False
        if entry.resident is None:
            return False
        self._eviction.placed(entry.score, self._now() - began)
        self._set_tier(entry, Tier.POOL if self._copy_is_done(entry.resident) else Tier.COPYING)
        return True

    def release(self, ref: AdapterRef) -> None:
        entry = self.entries[ref.digest]
        assert entry.pins > 0
        entry.pins -= 1
        self._eviction.released(entry.score)
        self._update(entry)

    # -- for the engine -----------------------------------------------------------------------------------------------

    def poll(self, *, at_once: bool = False) -> bool:
        """Take the results of loads, and start queued loads that fit the host, in order; True if there was a result,
        or an adapter's rows have been copied.

        `at_once`: no step runs that a copy could hold up, so the next one may wait for the rows that are on their way.
        """
        copying = self.at[Tier.COPYING].values()
        copied = [e for e in copying if at_once or (e.resident is not None and self._copy_is_done(e.resident))]
        for entry in copied:
            self._set_tier(entry, Tier.POOL)
        changed = bool(copied)
        while self._ended:
            entry, load = self._ended.popleft()
            if entry.load is load:  # it was not cancelled
                entry.load = None
                self._take_result(entry, load)
                changed = True
        self._drop(self.host.surplus())
        queued = self.at[Tier.QUEUED]
        while queued:
            entry = next(iter(queued.values()))
            victims = self.host.room_for(entry.ref.digest, entry.ref.nbytes, entry.waiters[0])
            if victims is None:
                break
            self._drop(victims)
            self.counts.num_loads += 1
            entry.load_began = self._now()
            entry.load = self._load(entry.ref)
            entry.load.add_done_callback(partial(self._load_ended, entry))
            self._set_tier(entry, Tier.LOADING)
        return changed

    def evict_one(self) -> bool:
        """Free the blocks of the idle adapter with the lowest value, see `EvictionPolicy`; False if all are pinned.

        Adapters for which requests wait are evicted last.
        """
        least = self.idle.peek()
        if least is None:
            return False
        (value, _), digest = least
        entry = self.entries[digest]
        if not entry.waiters:
            self.inflation.evicted(value)
        assert entry.resident is not None
        self._remove(entry.resident)
        entry.resident = None
        self.counts.num_evictions += 1
        self._leave(entry)
        return True

    def retire(self, digest: str) -> bool:
        """Drop an adapter from pool and host, and what is known of it; False, and nothing happens, while requests use
        it or wait for it, or it is being loaded.
        """
        entry = self.entries.get(digest)
        if entry is not None:
            if entry.pins or entry.waiters or entry.load is not None:
                return False
            if entry.resident is not None:
                self._remove(entry.resident)
                entry.resident = None
            if entry.packed is not None:
                self._drop_packed(entry)
            self._set_tier(entry, None)
        if self._gone.pop(digest, None) is not None:
            self._on_forget(digest)
        return True

    def check_integrity(self) -> None:
        """Raise AssertionError unless every index holds exactly its entries, and the host's bytes are counted."""
        entries = self.entries.values()
        for tier, there in self.at.items():
            assert there == {digest: e for digest, e in self.entries.items() if e.tier is tier}
        for e in entries:
            in_pool = e.tier in (Tier.COPYING, Tier.POOL)
            assert (e.resident is not None) is in_pool
            assert e.packed is not None if e.tier is Tier.HOST else e.packed is None or in_pool
            assert not e.pins or e.tier is Tier.POOL
            assert (e.load is not None) is (e.tier is Tier.LOADING)
        assert self.idle.items() == {e.ref.digest for e in entries if e.resident is not None and not e.pins}
        removable = {e.ref.digest: self._removable(e) for e in entries if e.packed is not None}
        self.host.check_integrity(sum(e.ref.nbytes for e in self.at[Tier.LOADING].values()), removable)

    # -- private ------------------------------------------------------------------------------------------------------

    def _set_tier(self, entry: Entry[P, R], tier: Tier | None) -> None:
        """The adapter has moved; its copies are what they are there. Nothing else changes its tier and the indexes, and
        tells those who wait: an adapter that moves untold lets its requests wait for ever. None: it is nowhere, no
        request waits, and it is forgotten.
        """
        digest, before = entry.ref.digest, entry.tier
        del self.at[before][digest]
        if before is Tier.LOADING:
            self.host.end_reservation(entry.ref.nbytes)
        if tier is None:
            del self.entries[digest]
            self.idle.discard(digest)
            self._gone[digest] = entry.usage
            if len(self._gone) > self._num_usages:
                self._on_forget(self._gone.popitem(last=False)[0])
            return
        entry.tier = tier
        self.at[tier][digest] = entry
        if tier is Tier.LOADING:
            self.host.reserve(entry.ref.nbytes)
        if not (before.is_on_its_way and tier.is_on_its_way):
            self._changed[digest] = None
        self._update(entry)

    def _update(self, entry: Entry[P, R]) -> None:
        """Its tier, its waiters, its pins or its copy on the host have changed."""
        digest = entry.ref.digest
        if entry.resident is not None and not entry.pins:
            value = math.inf
            if not entry.waiters:
                size = self.size(entry.resident)
                value = self._eviction.value(entry.score, size, on_host=entry.packed is not None)
            self.idle.set(digest, (value, entry.last_used))
        else:
            self.idle.discard(digest)
        self.host.set_removable(digest, self._removable(entry))

    def _removable(self, entry: Entry[P, R]) -> float | None:
        """When the first request came that waits for the copy on the host, infinite without one. None: there is no
        copy.
        """
        if entry.packed is None:
            return None
        return entry.waiters[0] if entry.tier is Tier.HOST and entry.waiters else math.inf

    def _touch(self, entry: Entry[P, R]) -> None:
        self._clock += 1
        entry.last_used = self._clock
        self._touch_copy(entry)

    def _touch_copy(self, entry: Entry[P, R]) -> None:
        uses, seconds = entry.usage.num_uses, entry.score.load_seconds
        self.host.touch(entry.ref.digest, self._eviction.reuse.expected(uses) * seconds)

    def _load_ended(self, entry: Entry[P, R], load: Future[P]) -> None:
        """Called in the loader's thread."""
        self._ended.append((entry, load))
        self._wake()

    def _take_result(self, entry: Entry[P, R], load: Future[P]) -> None:
        error = load.exception()
        if error is not None:
            self._fail(entry, error)
            return
        entry.packed = load.result()
        entry.score.load_seconds = self._now() - entry.load_began
        self.host.add(entry.ref.digest, entry.packed)
        self._touch_copy(entry)
        self.counts.num_loaded_bytes += entry.packed.nbytes
        self.load_seconds.observe(entry.score.load_seconds)
        self._backoff.succeeded(entry.ref.digest)
        self._set_tier(entry, Tier.HOST)

    def _fail(self, entry: Entry[P, R], error: BaseException) -> None:
        self.counts.num_failed_loads += 1
        entry.error = error if isinstance(error, Exception) else EngineError(f"loading {entry.ref.label}: {error!r}")
        entry.error = self._backoff.failed(entry.ref.digest, entry.error)
        self._set_tier(entry, Tier.FAILED if entry.waiters else None)

    def _drop_packed(self, entry: Entry[P, R]) -> None:
        self.host.drop(entry.ref.digest)
        entry.packed = None

    def _drop(self, digests: Iterable[str]) -> None:
        """Drop the copies on the host."""
        for digest in digests:
            entry = self.entries.get(digest)
            if entry is None:  # a prefix's block
                self.host.drop(digest)
                continue
            self._drop_packed(entry)
            self.counts.num_host_evictions += 1
            if entry.resident is None:
                self._leave(entry)
            else:
                self._update(entry)

    def _leave(self, entry: Entry[P, R]) -> None:
        """The adapter has left the pool, or the host: what is left of it is on the host, or is loaded again, after the
        queued ones, if a request waits for it.
        """
        if entry.packed is not None:
            self._set_tier(entry, Tier.HOST)
        else:
            self._set_tier(entry, Tier.QUEUED if entry.waiters else None)


# -- before requests come ----------------------------------------------------------------------------------------------


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
    """One batch of adapters that are loaded before requests come for them, as a new replica does. It is called from the
    engine's thread only, between steps; the engine's steps start the loads.

    It drops and evicts nothing: adapters that do not fit into what is free of `host_bytes` are left out, and those for
    which `has_room` is false stay on the host.
    """

    def __init__(self, manager: AdapterManager[P, R], host_bytes: int, has_room: Callable[[AdapterRef], bool]) -> None:
        self._manager, self._host_bytes, self._has_room = manager, host_bytes, has_room
        self._waiting: dict[str, AdapterRef] = {}
        self._ended: Counter[str] = Counter()  # by place

    def begin(self, refs: Iterable[AdapterRef]) -> bool:
        """Wait for as many of `refs` as fit, in their order; True if there is nothing to wait for."""
        nbytes = self._manager.host_used
        for ref in refs:
            if ref.digest in self._manager.entries or nbytes + ref.nbytes > self._host_bytes:
                continue
            nbytes += ref.nbytes
            self._manager.add_waiter(ref, again=True)
            self._waiting[ref.digest] = ref
        return self.look()

    def look(self) -> bool:
        """Take what has been loaded meanwhile; True if all has."""
        for ref in [ref for ref in self._waiting.values() if self._manager.tier(ref).place != "loading"]:
            entry = self._manager.entries[ref.digest]
            if entry.tier is Tier.HOST and self._has_room(ref) and self._manager.acquire(ref) is not None:
                self._manager.release(ref)
            self._ended[entry.tier.place] += 1
            del self._waiting[ref.digest]
            self._manager.remove_waiter(ref)
        return not self._waiting

    def end(self) -> Prefetched:
        """Wait for nothing any more."""
        for ref in self._waiting.values():
            self._manager.remove_waiter(ref)
        ended = self._ended
        return Prefetched(ended["pool"], ended["host"], ended["failed"], num_late=len(self._waiting))
