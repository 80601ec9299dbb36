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


class Stage(Enum):
    """Where an adapter is, more exactly than its tier. ARRIVING: it has blocks of the pool, its rows are on their way
    there, and no request has started with it.
    """

    QUEUED = 1, Tier.LOADING
    LOADING = 2, Tier.LOADING
    HOST = 3, Tier.HOST
    ARRIVING = 4, Tier.POOL
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

    load    None before the load starts and after its result has been taken
    pins    running requests that use the adapter
    wants   the times, by the table's clock, at which the waiting requests came; a request that leaves removes the first
    """

    ref: AdapterRef
    stage: Stage
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
    def tier(self) -> Tier:
        return self.stage.tier

    @property
    def is_partial(self) -> bool:
        """Usable, but not complete yet."""
        partial = None if self.packed is None else self.packed.partial
        return partial is not None and not partial.done


class AdapterTable(Generic[P, R]):
    """Entries by digest, and indexes of those in certain states. It owns the stage of each adapter, and the list of
    those whose requests are to be told, since an adapter that moves untold lets its requests wait for ever: both change
    together. Only Residency calls what changes it.

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
        self.at: dict[Stage, OrderedDict[str, Entry[P, R]]] = {stage: OrderedDict() for stage in Stage}
        self.partial: dict[str, Entry[P, R]] = {}  # on the host, and not complete when last looked at
        self._changed: dict[str, None] = {}
        # In the pool, and no running request uses it; the first is evicted first: the lowest value, then what was not
        # used for longest; those for which requests wait come last.
        self.idle: PriorityQueue[str] = PriorityQueue()
        self._clock = 0

    # -- reading ------------------------------------------------------------------------------------------------------

    def tier(self, ref: AdapterRef) -> Tier:
        """LOADING also for a partial adapter that is late: no step waits for it. It may be in the pool, and pinned.
        And for one whose rows are on their way to the pool.
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
    def has_changed(self) -> bool:
        """`take_changed` has something to tell."""
        return bool(self._changed)

    def take_changed(self) -> Collection[str]:
        """Digests of the adapters whose `tier` has changed since the last call."""
        changed, self._changed = self._changed, {}
        return changed

    @property
    def host_used(self) -> int:
        """Bytes of adapters in host memory, see `host`."""
        return self._host.used

    def check_integrity(self) -> None:
        """AssertionError unless every index holds exactly its entries, and the host's bytes are counted."""
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
        """An adapter whose load is queued, or has failed with `error`."""
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
        """Its wants, its pins or its copy on the host have changed."""
        digest = entry.ref.digest
        if entry.tier is Tier.POOL and not entry.pins:
            value = math.inf if entry.wants else self._value(entry)
            self.idle.set(digest, (value, entry.last_used))
        else:
            self.idle.discard(digest)
        self._host.set_removable(digest, self._removable(entry))

    # -- private ------------------------------------------------------------------------------------------------------

    def _tier(self, entry: Entry[P, R]) -> Tier:
        """See `tier`."""
        if entry.stage is Stage.ARRIVING:
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
        return entry.wants[0] if entry.tier is Tier.HOST and entry.wants else math.inf
