"""Where each adapter is: loading from the store, in host memory, or in the pool. The one owner of that truth.

    absent → LOADING → HOST ⇄ POOL        a failed load fails those who wait for it and leaves no trace

Loading runs elsewhere and blocks nobody; there is one flight per adapter whatever the number of requests. An adapter
is pinned in the pool while a request that uses it runs, and stays there idle afterwards until its rows are needed.
The host keeps what it loaded, least recently used first out, except what waiting requests want.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from typing import Generic, NamedTuple, Protocol, TypeVar

from loray.errors import EngineError
from loray.spec import AdapterRef


class Packed(Protocol):
    """An adapter in host memory, ready to be copied into the pool."""

    @property
    def nbytes(self) -> int: ...


P = TypeVar("P", bound=Packed)
R = TypeVar("R")


class Tier(Enum):
    LOADING = "loading"
    HOST = "host"
    POOL = "pool"
    FAILED = "failed"


class ResidencyCounts(NamedTuple):
    loads: int
    failed_loads: int
    evictions: int
    hits: int


@dataclass(slots=True)
class _Entry(Generic[P, R]):
    ref: AdapterRef
    tier: Tier
    flight: Future[P] | None = None
    packed: P | None = None
    resident: R | None = None
    error: Exception | None = None
    pins: int = 0
    wanted: int = 0
    last_used: int = 0


class Residency(Generic[P, R]):
    """Called from the engine's thread alone.

    load   starts a flight and returns its future; never blocks
    place  copies a packed adapter into the pool, or returns None when blocks are short
    remove gives a resident adapter's blocks back
    """

    def __init__(
        self,
        *,
        host_bytes: int,
        load: Callable[[AdapterRef], Future[P]],
        place: Callable[[AdapterRef, P], R | None],
        remove: Callable[[R], None],
    ) -> None:
        self._host_bytes = host_bytes
        self._load, self._place, self._remove = load, place, remove
        self._entries: dict[str, _Entry[P, R]] = {}
        self._clock = 0
        self._loads = self._failed = self._evictions = self._hits = 0

    # -- what requests do ---------------------------------------------------------------------------------------------

    def want(self, ref: AdapterRef) -> None:
        """A request that needs `ref` waits. Undone by `unwant`, once."""
        entry = self._entries.get(ref.digest)
        if entry is None:
            entry = self._entries[ref.digest] = _Entry(ref, Tier.LOADING)
        elif entry.tier is Tier.POOL:
            self._hits += 1
        entry.wanted += 1
        self._touch(entry)

    def unwant(self, ref: AdapterRef) -> None:
        entry = self._entries[ref.digest]
        entry.wanted -= 1
        if entry.tier is Tier.FAILED and not entry.wanted:
            del self._entries[ref.digest]

    def tier(self, ref: AdapterRef) -> Tier:
        return self._entries[ref.digest].tier

    def error(self, ref: AdapterRef) -> Exception:
        error = self._entries[ref.digest].error
        assert error is not None
        return error

    def acquire(self, ref: AdapterRef) -> R | None:
        """Pin `ref` in the pool, copying it there first if need be; None while blocks are short or it is not loaded."""
        entry = self._entries[ref.digest]
        if entry.tier is Tier.HOST:
            assert entry.packed is not None
            entry.resident = self._place(ref, entry.packed)
            if entry.resident is None:
                return None
            entry.tier = Tier.POOL
        if entry.tier is not Tier.POOL:
            return None
        entry.pins += 1
        self._touch(entry)
        return entry.resident

    def release(self, ref: AdapterRef) -> None:
        entry = self._entries[ref.digest]
        assert entry.pins > 0
        entry.pins -= 1

    # -- what the engine does -----------------------------------------------------------------------------------------

    def poll(self) -> bool:
        """Start flights that fit the host and take in those that have landed; True if anything landed."""
        landed = False
        for entry in list(self._entries.values()):
            if entry.tier is not Tier.LOADING:
                continue
            if entry.flight is None:
                if self._host_has_room(entry.ref.nbytes):
                    entry.flight = self._load(entry.ref)
                    self._loads += 1
            elif entry.flight.done():
                self._land(entry, entry.flight)
                landed = True
        return landed

    def evict_one(self) -> bool:
        """Give back the blocks of the least recently used idle adapter; False if every resident is pinned."""
        idle = [e for e in self._entries.values() if e.tier is Tier.POOL and not e.pins]
        if not idle:
            return False
        entry = min(idle, key=lambda e: (e.wanted > 0, e.last_used))
        assert entry.resident is not None
        self._remove(entry.resident)
        entry.resident = None
        self._evictions += 1
        if entry.packed is not None:
            entry.tier = Tier.HOST
        elif entry.wanted:
            entry.tier, entry.flight = Tier.LOADING, None
        else:
            del self._entries[entry.ref.digest]
        return True

    @property
    def num_loading(self) -> int:
        return sum(e.tier is Tier.LOADING for e in self._entries.values())

    def resident(self, ref: AdapterRef) -> R:
        resident = self._entries[ref.digest].resident
        assert resident is not None
        return resident

    def packed(self, ref: AdapterRef) -> P | None:
        """The host copy, if it is still there."""
        return self._entries[ref.digest].packed

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

    def counts(self) -> ResidencyCounts:
        return ResidencyCounts(self._loads, self._failed, self._evictions, self._hits)

    @property
    def host_used(self) -> int:
        """Bytes of packed adapters in host memory, flights under way counted with their published size."""
        landed = sum(e.packed.nbytes for e in self._entries.values() if e.packed is not None)
        flying = sum(e.ref.nbytes for e in self._entries.values() if e.tier is Tier.LOADING and e.flight is not None)
        return landed + flying

    # -- inside -------------------------------------------------------------------------------------------------------

    def _touch(self, entry: _Entry[P, R]) -> None:
        self._clock += 1
        entry.last_used = self._clock

    def _land(self, entry: _Entry[P, R], flight: Future[P]) -> None:
        entry.flight = None
        error = flight.exception()
        if error is None:
            entry.packed, entry.tier = flight.result(), Tier.HOST
        else:
            self._failed += 1
            entry.tier = Tier.FAILED
            entry.error = (
                error if isinstance(error, Exception) else EngineError(f"loading {entry.ref.label}: {error!r}")
            )
            if not entry.wanted:
                del self._entries[entry.ref.digest]

    def _host_has_room(self, nbytes: int) -> bool:
        """Make room for `nbytes` by dropping host copies that nobody waits for. One adapter always may come in."""
        droppable = [
            e for e in self._entries.values() if e.packed is not None and not (e.wanted and e.tier is Tier.HOST)
        ]
        droppable.sort(key=lambda e: e.last_used)
        while self.host_used + nbytes > self._host_bytes and droppable:
            entry = droppable.pop(0)
            entry.packed = None
            if entry.tier is Tier.HOST:
                del self._entries[entry.ref.digest]
        return self.host_used + nbytes <= self._host_bytes or self.host_used == 0
