"""Where a simulated replica's adapters are: pool, host, or loading. The engine's `AdapterWorth` evicts."""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import Protocol

from loray.engine.memory.priority import PriorityQueue
from loray.engine.residency.eviction import AdapterWorth, EvictionScore
from loray.simulation.profile import Profile


class Listener(Protocol):
    """Told when an adapter's place on a replica changes."""

    def placed(self, replica: int, adapter: int, tier: int) -> None:
        """`tier`: POOL, HOST or NOWHERE."""
        ...


POOL, HOST, NOWHERE = 0, 1, 2


class ReplicaAdapters:
    """One replica's pool and host. The pool is shared with the KV cache: see `take`.

    Loads are in order, `profile.num_loads` at once; the caller says when one has ended.
    """

    def __init__(self, replica: int, profile: Profile, sizes: list[int], listener: Listener) -> None:
        self._replica, self._profile, self._sizes, self._listener = replica, profile, sizes, listener
        self._worth = AdapterWorth()
        self._scores: dict[int, EvictionScore] = {}  # of those in the pool
        self._pins: dict[int, int] = {}  # of those in the pool
        self._idle: PriorityQueue[int] = PriorityQueue()
        self._host: OrderedDict[int, None] = OrderedDict()
        self._host_used = 0
        self._uses = 0
        self.free = profile.pool_bytes
        self.waiting: dict[int, int] = {}  # adapter → requests that wait for its load; it is loading or queued
        self._queued: deque[int] = deque()
        self._num_loading = 0
        self.num_loads = self.num_evictions = 0

    def tier(self, adapter: int) -> int:
        return POOL if adapter in self._pins else HOST if adapter in self._host else NOWHERE

    def want(self, adapter: int) -> tuple[bool, bool]:
        """A request comes: whether it may start now, and whether a load of its adapter begins now."""
        if adapter in self._host:
            self._host.move_to_end(adapter)
        if self.tier(adapter) != NOWHERE:
            return True, False
        if adapter in self.waiting:
            self.waiting[adapter] += 1
            return False, False
        self.waiting[adapter] = 1
        self.num_loads += 1
        if self._num_loading < self._profile.num_loads:
            self._num_loading += 1
            return False, True
        self._queued.append(adapter)
        return False, False

    def loaded(self, adapter: int) -> int | None:
        """The load has ended; returns an adapter whose load begins in its place."""
        del self.waiting[adapter]
        self._add(adapter)
        if self._queued:
            return self._queued.popleft()
        self._num_loading -= 1
        return None

    def _add(self, adapter: int) -> None:
        """To the host, from which the least recently used leave."""
        self._host[adapter] = None
        self._host_used += self._sizes[adapter]
        self._listener.placed(self._replica, adapter, HOST)
        while self._host_used > self._profile.host_bytes and len(self._host) > 1:
            oldest, _ = self._host.popitem(last=False)
            self._host_used -= self._sizes[oldest]
            if oldest not in self._pins:
                self._listener.placed(self._replica, oldest, NOWHERE)
            elif not self._pins[oldest]:
                self._set_idle(oldest)  # to have it again would take a load now

    def prefetch(self, adapter: int) -> None:
        """It is on the host, without a load that anybody waited for."""
        if self.tier(adapter) == NOWHERE and adapter not in self.waiting:
            self._add(adapter)

    def take(self, adapter: int, kv_bytes: float) -> float | None:
        """Pin the adapter and take `kv_bytes` of the pool, evicting idle adapters; the seconds of copying it there.

        None if pinned adapters and KV caches leave no room; nothing is changed then.
        """
        pins = self._pins.get(adapter)
        needed = kv_bytes + (0 if pins is not None else self._sizes[adapter])
        if pins == 0:
            self._idle.discard(adapter)
        while self.free < needed:
            least = self._idle.peek()
            if least is None:
                if pins == 0:
                    self._release(adapter)
                return None
            self._evict(least[1], least[0][0])
        self.free -= needed
        self._uses += 1
        if pins is not None:
            self._pins[adapter] = pins + 1
            self._worth.used(self._scores[adapter])
            return 0.0
        seconds = self._profile.place_seconds(self._sizes[adapter])
        self._pins[adapter] = 1
        score = self._scores[adapter] = EvictionScore(load_seconds=self._profile.load_seconds(self._sizes[adapter]))
        self._worth.placed(score, seconds, self._sizes[adapter])
        self._worth.used(score)
        self._listener.placed(self._replica, adapter, POOL)
        return seconds

    def give_back(self, adapter: int, kv_bytes: float) -> None:
        """A request that ran with the adapter has ended."""
        self.free += kv_bytes
        self._pins[adapter] -= 1
        if not self._pins[adapter]:
            self._release(adapter)

    def _release(self, adapter: int) -> None:
        self._worth.released(self._scores[adapter])
        self._set_idle(adapter)

    def _set_idle(self, adapter: int) -> None:
        score = self._scores[adapter]
        value = self._worth.value(score, self._sizes[adapter], on_host=adapter in self._host)
        self._idle.set(adapter, (value, self._uses))

    def _evict(self, adapter: int, value: float) -> None:
        self._worth.floor.evicted(value)
        self._idle.discard(adapter)
        del self._pins[adapter], self._scores[adapter]
        self.free += self._sizes[adapter]
        self.num_evictions += 1
        self._listener.placed(self._replica, adapter, HOST if adapter in self._host else NOWHERE)
