"""Where each adapter is: loading from the store, in host memory, or in the pool. The one owner of that truth.

    absent → LOADING → HOST ⇄ POOL        a failed load fails those who need it and leaves no trace

An adapter may be usable, on the host or in the pool, while the last of it still arrives; where a step has waited for
it in vain it is LOADING again until it is whole.
Loading runs elsewhere and blocks nobody; there is one flight per adapter whatever the number of requests. An adapter
is pinned in the pool while a request that uses it runs, and stays there idle afterwards until its rows are needed.
The host keeps what it loaded, least recently used first out, except what waiting requests want.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, NamedTuple, Protocol, TypeVar

from loray.engine.arrival import Arrival
from loray.engine.eviction import GreedyDual, Worth
from loray.engine.histogram import Histogram
from loray.engine.usage import ResidencyCounts, UsageLog
from loray.errors import EngineError
from loray.spec import AdapterRef
from loray.telemetry import METRICS


class Packed(Protocol):
    """An adapter in host memory, ready to be copied into the pool."""

    @property
    def nbytes(self) -> int: ...

    @property
    def arrival(self) -> Arrival | None:
        """None where it is whole."""
        ...


P = TypeVar("P", bound=Packed)
R = TypeVar("R")


class Tier(Enum):
    LOADING = "loading"
    HOST = "host"
    POOL = "pool"
    FAILED = "failed"


class AdapterPlace(NamedTuple):
    """Where an adapter is and how it has been used. `tier` None: not here (any more). `last_used_at`: epoch seconds."""

    ref: AdapterRef
    tier: Tier | None
    num_uses: int
    last_used_at: float
    num_tokens: int


@dataclass(slots=True)
class _Entry(Generic[P, R]):
    ref: AdapterRef
    tier: Tier
    flight: Future[P] | None = None
    flight_began: float = 0.0
    packed: P | None = None
    resident: R | None = None
    error: Exception | None = None
    pins: int = 0
    wanted: int = 0
    last_used: int = 0
    worth: Worth = field(default_factory=Worth)


class Residency(Generic[P, R]):
    """Called from the engine's thread alone.

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
        self.usage = usage or UsageLog()
        self.counts = ResidencyCounts()
        self.load_seconds = Histogram(METRICS["adapter_load_seconds"].buckets)
        self._now = clock
        self._host_bytes = host_bytes
        self._load, self._place, self._remove, self._size = load, place, remove, size
        self._eviction = GreedyDual()
        self._entries: dict[str, _Entry[P, R]] = {}
        self._queued: dict[str, _Entry[P, R]] = {}  # LOADING without a flight, in order
        self._flying: dict[str, _Entry[P, R]] = {}
        self._arriving: dict[str, _Entry[P, R]] = {}  # on the host or in the pool already, and not whole yet
        self._host_used = 0
        self._clock = 0

    # -- what requests do ---------------------------------------------------------------------------------------------

    def want(self, ref: AdapterRef, *, again: bool = False) -> None:
        """A request that needs `ref` waits. Undone by `unwant`, once. `again`: it was preempted, and counts no more."""
        entry = self._entries.get(ref.digest)
        if not again:
            tier = None if entry is None else entry.tier
            self.counts.pool_hits += tier is Tier.POOL
            self.counts.host_hits += tier is Tier.HOST
            self.counts.misses += tier not in (Tier.POOL, Tier.HOST)
            self.usage.asked(ref)
        if entry is None:
            entry = self._entries[ref.digest] = _Entry(ref, Tier.LOADING)
            self._queued[ref.digest] = entry
        entry.wanted += 1
        self._touch(entry)

    def unwant(self, ref: AdapterRef) -> None:
        entry = self._entries[ref.digest]
        entry.wanted -= 1
        if entry.wanted:
            return
        if entry.tier is Tier.FAILED:
            self._forget_failed(entry)
        elif entry.tier is Tier.LOADING and (entry.flight is None or entry.flight.cancel()):
            # Nobody waits for it any more. A flight that is under way already lands in the host's cache.
            self._queued.pop(ref.digest, None)
            if self._flying.pop(ref.digest, None) is not None:
                self._host_used -= ref.nbytes
            self._forget(entry)

    def tier(self, ref: AdapterRef) -> Tier:
        """LOADING for a resident, pinned perhaps, that no step is to wait for: it comes late."""
        entry = self._entries[ref.digest]
        if entry.packed is not None and ref.digest in self._arriving:
            assert entry.packed.arrival is not None
            if entry.packed.arrival.late:
                return Tier.LOADING
        return entry.tier

    def error(self, ref: AdapterRef) -> Exception:
        error = self._entries[ref.digest].error
        assert error is not None
        return error

    def acquire(self, ref: AdapterRef) -> R | None:
        """Pin `ref` in the pool, copying it there first if need be.

        None while blocks are short or it is not loaded, or where it cannot be placed: then its tier is FAILED.
        """
        entry = self._entries[ref.digest]
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
            seconds = None if _is_arriving(entry) else self._now() - began
            self._eviction.placed(entry.worth, seconds, self._size(entry.resident))
        if entry.tier is not Tier.POOL:
            return None
        entry.pins += 1
        self._eviction.used(entry.worth)
        self._touch(entry)
        return entry.resident

    def release(self, ref: AdapterRef) -> None:
        entry = self._entries[ref.digest]
        assert entry.pins > 0
        entry.pins -= 1
        if entry.tier is Tier.FAILED:
            self._forget_failed(entry)
        self._eviction.left(entry.worth)

    # -- what the engine does -----------------------------------------------------------------------------------------

    def poll(self) -> bool:
        """Take in flights that have landed and start those that fit the host, in order; True if anything landed."""
        landed = [entry for entry in self._flying.values() if entry.flight is not None and entry.flight.done()]
        for entry in landed:
            self._land(entry)
        whole = [entry for entry in self._arriving.values() if not _is_arriving(entry)]
        for entry in whole:
            self._end_flight(entry)
        while self._queued:
            entry = next(iter(self._queued.values()))
            if not self._make_room(entry.ref.nbytes):
                break
            del self._queued[entry.ref.digest]
            self._flying[entry.ref.digest] = entry
            self._host_used += entry.ref.nbytes
            self.counts.loads += 1
            entry.flight_began = self._now()
            entry.flight = self._load(entry.ref)
        return bool(landed or whole)

    def evict_one(self) -> bool:
        """Give back the blocks of the idle adapter that is worth least, see `eviction`; False if all are pinned.

        Those that waiting requests want go last.
        """
        idle = [e for e in self._entries.values() if e.tier is Tier.POOL and not e.pins]
        if not idle:
            return False
        entry = min(idle, key=lambda e: (e.wanted > 0, self._value(e), e.last_used))
        assert entry.resident is not None
        if not entry.wanted:
            self._eviction.evicted(self._value(entry))
        self._remove(entry.resident)
        entry.resident = None
        self.counts.evictions += 1
        if entry.packed is not None:
            entry.tier = Tier.HOST
        elif entry.wanted:
            entry.tier = Tier.LOADING
            self._queued[entry.ref.digest] = entry
        else:
            self._forget(entry)
        return True

    def resident(self, ref: AdapterRef) -> R:
        resident = self._entries[ref.digest].resident
        assert resident is not None
        return resident

    def pins(self) -> dict[str, int]:
        return {digest: e.pins for digest, e in self._entries.items() if e.pins}

    def wants(self) -> dict[str, int]:
        return {digest: e.wanted for digest, e in self._entries.items() if e.wanted}

    def residents(self) -> list[R]:
        return [e.resident for e in self._entries.values() if e.resident is not None]

    def by_tier(self) -> dict[Tier, list[AdapterRef]]:
        tiers: dict[Tier, list[AdapterRef]] = {tier: [] for tier in Tier}
        for entry in self._entries.values():
            tiers[entry.tier].append(entry.ref)
        return tiers

    def places(self, digests: Collection[str] | None = None) -> list[AdapterPlace]:
        """Of these adapters, or of all that are known; an adapter that was never asked for is left out."""
        known = self.usage.all() if digests is None else filter(None, map(self.usage.get, digests))
        places = []
        for usage in known:
            entry = self._entries.get(usage.ref.digest)
            tier = None if entry is None or entry.tier is Tier.FAILED else entry.tier
            places.append(AdapterPlace(usage.ref, tier, usage.num_uses, usage.last_used_at, usage.num_tokens))
        return places

    @property
    def host_used(self) -> int:
        """Bytes of packed adapters in host memory, flights under way counted with their published size."""
        return self._host_used

    def check_integrity(self) -> None:
        """AssertionError unless the counters agree with the entries, and whoever is LOADING is queued or flying."""
        entries = self._entries.values()
        landed = sum(e.packed.nbytes for e in entries if e.packed is not None)
        assert self._host_used == landed + sum(e.ref.nbytes for e in self._flying.values())
        loading = {e.ref.digest for e in entries if e.tier is Tier.LOADING}
        assert loading == self._queued.keys() | self._flying.keys()
        assert not self._queued.keys() & self._flying.keys()
        assert all(self._entries[digest].packed is not None for digest in self._arriving)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _value(self, entry: _Entry[P, R]) -> float:
        assert entry.resident is not None
        return self._eviction.value(entry.worth, self._size(entry.resident), on_host=entry.packed is not None)

    def _touch(self, entry: _Entry[P, R]) -> None:
        self._clock += 1
        entry.last_used = self._clock

    def _forget(self, entry: _Entry[P, R]) -> None:
        del self._entries[entry.ref.digest]
        self.usage.let_go(entry.ref)

    def _land(self, entry: _Entry[P, R]) -> None:
        assert entry.flight is not None
        del self._flying[entry.ref.digest]
        self._host_used -= entry.ref.nbytes
        flight, entry.flight = entry.flight, None
        error = flight.exception()
        if error is None:
            entry.packed, entry.tier = flight.result(), Tier.HOST
            self._host_used += entry.packed.nbytes
            if _is_arriving(entry):
                self._arriving[entry.ref.digest] = entry
            else:
                self._end_flight(entry)
        else:
            self._fail(entry, error)

    def _end_flight(self, entry: _Entry[P, R]) -> None:
        """All of it has come, or never will."""
        assert entry.packed is not None
        self._arriving.pop(entry.ref.digest, None)
        arrival = entry.packed.arrival
        if arrival is not None:
            arrival.late = False
        if arrival is not None and arrival.error is not None:
            error = arrival.error
            self._drop_packed(entry)
            self._fail(entry, error)
        else:
            self.counts.loaded_bytes += entry.packed.nbytes
            entry.worth.load_seconds = self._now() - entry.flight_began
            self.load_seconds.observe(entry.worth.load_seconds)

    def _fail(self, entry: _Entry[P, R], error: BaseException) -> None:
        self.counts.failed_loads += 1
        entry.tier = Tier.FAILED
        entry.error = error if isinstance(error, Exception) else EngineError(f"loading {entry.ref.label}: {error!r}")
        self._forget_failed(entry)

    def _forget_failed(self, entry: _Entry[P, R]) -> None:
        """Once nobody runs on it its blocks go back, and once nobody waits for it either it may be tried again."""
        if entry.pins:
            return
        if entry.resident is not None:
            self._remove(entry.resident)
            entry.resident = None
        if not entry.wanted:
            self._forget(entry)

    def _drop_packed(self, entry: _Entry[P, R]) -> None:
        assert entry.packed is not None
        self._arriving.pop(entry.ref.digest, None)
        self._host_used -= entry.packed.nbytes
        entry.packed = None

    def _make_room(self, nbytes: int) -> bool:
        """Drop host copies that nobody waits for, oldest first, if that makes room. One adapter always may come in."""
        excess = self._host_used + nbytes - self._host_bytes
        if excess <= 0:
            return True
        droppable = [
            e
            for e in self._entries.values()
            if e.packed is not None and not (e.wanted and e.tier is Tier.HOST) and not _is_arriving(e)
        ]
        room = sum(e.packed.nbytes for e in droppable if e.packed is not None)
        if room < excess and room < self._host_used:
            return False
        for entry in sorted(droppable, key=lambda e: e.last_used):
            if excess <= 0:
                break
            assert entry.packed is not None
            excess -= entry.packed.nbytes
            self._drop_packed(entry)
            self.counts.host_evictions += 1
            if entry.tier is Tier.HOST:
                self._forget(entry)
        return True


def _is_arriving(entry: _Entry[P, R]) -> bool:
    arrival = None if entry.packed is None else entry.packed.arrival
    return arrival is not None and not arrival.done
