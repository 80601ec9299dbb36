"""The table of adapters: where each is, who waits for it and who runs on it. `residency` changes it."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, NamedTuple, TypeVar

from loray.engine.residency.eviction import Worth
from loray.engine.residency.host import HostMemory, Packed
from loray.engine.stats.usage import UsageLog
from loray.spec import AdapterRef

P = TypeVar("P", bound=Packed)
R = TypeVar("R")


class Tier(Enum):
    LOADING = "loading"
    HOST = "host"
    POOL = "pool"
    FAILED = "failed"


class Placement(NamedTuple):
    """Where an adapter is and how it has been used. `tier` None: not here (any more). `last_used_at`: epoch seconds."""

    ref: AdapterRef
    tier: Tier | None
    num_uses: int
    last_used_at: float
    num_tokens: int


@dataclass(slots=True)
class Entry(Generic[P, R]):
    """`wants`: when those who wait asked, by the table's clock; whoever leaves is taken to have asked first."""

    ref: AdapterRef
    tier: Tier
    flight: Future[P] | None = None
    flight_began: float = 0.0
    packed: P | None = None
    resident: R | None = None
    error: Exception | None = None
    pins: int = 0
    wants: deque[int] = field(default_factory=deque)
    last_used: int = 0
    worth: Worth = field(default_factory=Worth)

    @property
    def is_arriving(self) -> bool:
        """Usable, but not whole yet."""
        arrival = None if self.packed is None else self.packed.arrival
        return arrival is not None and not arrival.done


class AdapterTable(Generic[P, R]):
    """Entries by digest, and those among them that something is to be done with. Only Residency changes it."""

    def __init__(self, host: HostMemory[P], usage: UsageLog) -> None:
        self.usage = usage
        self._host = host
        self.entries: dict[str, Entry[P, R]] = {}
        self.queued: dict[str, Entry[P, R]] = {}  # LOADING without a flight, in order
        self.flying: dict[str, Entry[P, R]] = {}
        self.arriving: dict[str, Entry[P, R]] = {}
        self.needed: dict[str, Entry[P, R]] = {}  # HOST, and somebody waits
        self.idle: dict[str, Entry[P, R]] = {}  # POOL, and nobody runs on it
        self._clock = 0

    # -- looking in ---------------------------------------------------------------------------------------------------

    def tier(self, ref: AdapterRef) -> Tier:
        """LOADING for a resident, pinned perhaps, that no step is to wait for: it comes late."""
        entry = self.entries[ref.digest]
        if entry.packed is not None and ref.digest in self.arriving:
            assert entry.packed.arrival is not None
            if entry.packed.arrival.late:
                return Tier.LOADING
        return entry.tier

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

    def wants(self) -> dict[str, int]:
        return {digest: len(e.wants) for digest, e in self.entries.items() if e.wants}

    def residents(self) -> list[R]:
        return [e.resident for e in self.entries.values() if e.resident is not None]

    def by_tier(self) -> dict[Tier, list[AdapterRef]]:
        tiers: dict[Tier, list[AdapterRef]] = {tier: [] for tier in Tier}
        for entry in self.entries.values():
            tiers[entry.tier].append(entry.ref)
        return tiers

    def placements(self, digests: Collection[str] | None = None) -> list[Placement]:
        """Of these adapters, or of all that are known; an adapter that was never asked for is left out."""
        known = self.usage.all() if digests is None else filter(None, map(self.usage.get, digests))
        found = []
        for usage in known:
            entry = self.entries.get(usage.ref.digest)
            tier = None if entry is None or entry.tier is Tier.FAILED else entry.tier
            found.append(Placement(usage.ref, tier, usage.num_uses, usage.last_used_at, usage.num_tokens))
        return found

    @property
    def host_used(self) -> int:
        """Bytes of adapters in host memory, see `host`."""
        return self._host.used

    def check_integrity(self) -> None:
        """AssertionError unless every list holds exactly its entries, and the host's bytes are counted."""
        entries = self.entries.values()
        loading = {e.ref.digest for e in entries if e.tier is Tier.LOADING}
        assert loading == self.queued.keys() | self.flying.keys()
        assert not self.queued.keys() & self.flying.keys()
        assert all(self.entries[digest].packed is not None for digest in self.arriving)
        assert self.idle.keys() == {e.ref.digest for e in entries if e.tier is Tier.POOL and not e.pins}
        assert self.needed.keys() == {e.ref.digest for e in entries if e.tier is Tier.HOST and e.wants}
        whole = {e.ref.digest for e in entries if e.packed is not None and e.ref.digest not in self.arriving}
        self._host.check_integrity(sum(e.ref.nbytes for e in self.flying.values()), whole - self.needed.keys())

    # -- keeping the lists --------------------------------------------------------------------------------------------

    def touch(self, entry: Entry[P, R]) -> None:
        self._clock += 1
        entry.last_used = self._clock
        self._host.touch(entry.ref.digest)

    def changed(self, entry: Entry[P, R]) -> None:
        """Its tier, who waits for it or who runs on it has."""
        digest = entry.ref.digest
        for entries, belongs in (
            (self.needed, entry.tier is Tier.HOST and entry.wants),
            (self.idle, entry.tier is Tier.POOL and not entry.pins),
        ):
            if belongs:
                entries[digest] = entry
            else:
                entries.pop(digest, None)
        if entry.packed is None or digest in self.arriving or digest in self.needed:
            self._host.need(digest)
        else:
            self._host.spare(digest)

    def asked_for_after(self, first: Entry[P, R]) -> Iterator[str]:
        """Copies that are needed, but by nobody who asked before those who wait for `first`; the latest first."""
        later = [e for d, e in self.needed.items() if e.wants[0] > first.wants[0] and d not in self.arriving]
        yield from (e.ref.digest for e in sorted(later, key=lambda e: -e.wants[0]))

    def forget(self, entry: Entry[P, R]) -> None:
        """It is nowhere any more."""
        del self.entries[entry.ref.digest]
        self.needed.pop(entry.ref.digest, None)
        self.idle.pop(entry.ref.digest, None)
        self.usage.let_go(entry.ref)
