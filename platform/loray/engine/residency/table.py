"""The table of adapters: where each one is, and which requests wait for it or run with it. `residency` changes it."""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Generic, NamedTuple, TypeVar

from loray.engine.memory.priority import PriorityQueue
from loray.engine.residency.eviction import EvictionScore
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
    """One adapter.

    load    None before the load starts and after its result has been taken
    pins    running requests that use the adapter
    wants   the times, by the table's clock, at which the waiting requests came; a request that leaves removes the first
    """

    ref: AdapterRef
    tier: Tier
    load: Future[P] | None = None
    load_began: float = 0.0
    packed: P | None = None
    resident: R | None = None
    error: Exception | None = None
    pins: int = 0
    wants: deque[int] = field(default_factory=deque)
    last_used: int = 0
    score: EvictionScore = field(default_factory=EvictionScore)

    @property
    def is_partial(self) -> bool:
        """Usable, but not complete yet."""
        partial = None if self.packed is None else self.packed.partial
        return partial is not None and not partial.done


class AdapterTable(Generic[P, R]):
    """Entries by digest, and indexes of those in certain states. Only Residency changes it.

    Nothing that is called for a request or a step visits all entries, however many there are.
    """

    def __init__(
        self, host: HostMemory[P], usage: UsageLog, value: Callable[[Entry[P, R]], float] = lambda entry: 0.0
    ) -> None:
        """`value`: of an idle adapter, see `eviction`; taken when the entry was last changed."""
        self.usage = usage
        self._host = host
        self._value = value
        self.entries: dict[str, Entry[P, R]] = {}
        self.queued: OrderedDict[str, Entry[P, R]] = OrderedDict()  # LOADING, the load has not started; in order
        self.loading: dict[str, Entry[P, R]] = {}  # LOADING, the load has started
        self.partial: dict[str, Entry[P, R]] = {}  # HOST or POOL, and not complete when last looked at
        self.arriving: dict[str, Entry[P, R]] = {}  # POOL, but the rows are on their way, and no request has started
        # POOL, and no running request uses it; the first is evicted first: the lowest value, then what was not used for
        # longest; those for which requests wait come last.
        self.idle: PriorityQueue[str] = PriorityQueue()
        self._clock = 0

    # -- reading ------------------------------------------------------------------------------------------------------

    def tier(self, ref: AdapterRef) -> Tier:
        """LOADING also for a partial adapter that is late: no step waits for it. It may be in the pool, and pinned.
        And for one whose rows are on their way to the pool.
        """
        entry = self.entries[ref.digest]
        if ref.digest in self.arriving:
            return Tier.LOADING
        if entry.packed is not None and ref.digest in self.partial:
            assert entry.packed.partial is not None
            if entry.packed.partial.late:
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
        """Of these adapters, or of all that are known; an adapter that was never requested is left out."""
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
        """AssertionError unless every index holds exactly its entries, and the host's bytes are counted."""
        entries = self.entries.values()
        loading = {e.ref.digest for e in entries if e.tier is Tier.LOADING}
        assert loading == self.queued.keys() | self.loading.keys()
        assert not self.queued.keys() & self.loading.keys()
        assert all(self.entries[digest].packed is not None for digest in self.partial)
        assert all(e.tier is Tier.POOL and not e.pins for e in self.arriving.values())
        assert self.idle.items() == {e.ref.digest for e in entries if e.tier is Tier.POOL and not e.pins}
        removable = {e.ref.digest: self._removable(e) for e in entries if e.packed is not None}
        self._host.check_integrity(sum(e.ref.nbytes for e in self.loading.values()), removable)

    # -- keeping the indexes ------------------------------------------------------------------------------------------

    def touch(self, entry: Entry[P, R]) -> None:
        self._clock += 1
        entry.last_used = self._clock
        self._host.touch(entry.ref.digest)

    def update(self, entry: Entry[P, R]) -> None:
        """Its tier, its wants, its pins or its copy on the host have changed."""
        digest = entry.ref.digest
        if entry.tier is Tier.POOL and not entry.pins:
            value = math.inf if entry.wants else self._value(entry)
            self.idle.set(digest, (value, entry.last_used))
        else:
            self.idle.discard(digest)
        self._host.set_removable(digest, self._removable(entry))

    def _removable(self, entry: Entry[P, R]) -> float | None:
        """When the first request came that waits for the copy on the host, infinite without one. None: there is no
        copy, or it is not complete.
        """
        if entry.packed is None or entry.ref.digest in self.partial:
            return None
        return entry.wants[0] if entry.tier is Tier.HOST and entry.wants else math.inf

    def forget(self, entry: Entry[P, R]) -> None:
        """The adapter is neither in the pool nor on the host nor loading."""
        del self.entries[entry.ref.digest]
        self.idle.discard(entry.ref.digest)
        self.usage.dropped(entry.ref)
