"""Routers: how the policies that are compared choose a replica."""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections import Counter, deque
from heapq import heappop, heappush
from math import floor

import numpy as np
from numpy.typing import NDArray

from loray.policy.routing import RoutingPolicy, hashed, mixed, routing_key
from loray.simulation.cluster import NOWHERE, POOL, SimulatedRequest
from loray.simulation.profile import Profile
from loray.simulation.workload import digest

_RECENT = 2
_NUM_FIRST, _MOST_CHANGES = 8, 32
_MANY = 48  # holders, from which on NumPy is faster than a loop
_MOST = 1 << 62
_PERIOD_S, _WINDOW_PERIODS, _COOLDOWN, _SMOOTHING = 3.0, 30, 3, 0.3  # of Dynamo's controller, its defaults
_MOST_COMPARED = 32  # of a larger set so many are drawn


class RoutingIndex:
    """The knowledge of a router: the replicas in its slots, and the adapters that they hold.

    `Routing.rank` looks at every replica for every request. Here a request for an adapter that is held looks at its
    holders, in the order of their hashes, until one is within bounds; only one that no such replica holds looks at all,
    as columns. A test holds both to the same choices.

    size       slots
    adapters   64 bits of each adapter's routing key, see `routing.hashed`
    """

    def __init__(self, size: int, adapters: NDArray[np.uint64], limit: int, policy: RoutingPolicy) -> None:
        self._policy, self._limit = policy, limit
        self._adapters = adapters
        self._hash_N = np.zeros(size, np.uint64)
        self._hashes = [0] * size
        self._is_here_N = np.zeros(size, bool)
        self._load_N = np.zeros(size, np.int64)
        self._held_N = np.zeros(size, np.int64)
        self._loads, self._held = [0] * size, [0] * size
        self._unanswered_N = np.zeros(size, np.int64)  # tokens of prompts
        self._unanswered = [0] * size
        # Replicas with nothing unanswered and a load that is within every bound: while there is one, the fewest
        # unanswered tokens are none.
        self._spare_load = min(policy.floor, limit)
        self._num_spare = 0
        self._num_here = self._num_free = self._sum_load = self._sum_held = 0  # the sums are of those below the limit
        self._holders: dict[int, list[tuple[int, int]]] = {}  # adapter → (negative weight, slot), sorted
        self._holder_slots: dict[int, NDArray[np.int64]] = {}  # of some adapters: the slots of `_holders`
        self._tiers: list[dict[int, int]] = [{} for _ in range(size)]  # adapter → tier
        self._sent: deque[tuple[float, int, int]] = deque()
        self._last_sent: dict[tuple[int, int], float] = {}
        # adapter → the number of changes, and its first replicas by hash then: (negative weight, slot), sorted
        self._first: dict[int, tuple[int, list[tuple[int, int]]]] = {}
        self._changes: list[tuple[int, bool]] = []  # slots, and whether a replica was added
        # The number of changes, the slots of the replicas then, and their hashes.
        self._here = (-1, np.zeros(0, np.int64), np.zeros(0, np.uint64))

    # -- what changes -------------------------------------------------------------------------------------------------

    def add(self, slot: int, name: str) -> None:
        self._hashes[slot] = hashed(name)
        self._hash_N[slot] = self._hashes[slot]
        self._is_here_N[slot] = True
        self._loads[slot] = self._held[slot] = self._unanswered[slot] = 0
        self._load_N[slot] = self._held_N[slot] = self._unanswered_N[slot] = 0
        self._num_here += 1
        self._num_free += 1
        self._num_spare += self._spare_load > 0
        self._changes.append((slot, True))

    def remove(self, slot: int) -> None:
        for adapter in list(self._tiers[slot]):
            self._set_tier(slot, adapter, None)
        if self._loads[slot] < self._limit:
            self._num_free -= 1
            self._sum_load -= self._loads[slot]
        self._num_spare -= not self._unanswered[slot] and self._loads[slot] < self._spare_load
        self._is_here_N[slot] = False
        self._num_here -= 1
        self._changes.append((slot, False))

    def set_load(self, slot: int, load: int) -> None:
        before = self._loads[slot]
        self._loads[slot] = load
        self._load_N[slot] = load
        if not self._unanswered[slot]:
            self._num_spare += (load < self._spare_load) - (before < self._spare_load)
        was_free, is_free = before < self._limit, load < self._limit
        self._sum_load += load * is_free - before * was_free
        if was_free != is_free:
            change = is_free - was_free
            self._num_free += change
            self._sum_held += change * self._held[slot]

    def add_prompt(self, slot: int, tokens: int) -> None:
        """A prompt of so many tokens was sent there; with fewer than none, one has been answered."""
        before, now = self._unanswered[slot], self._unanswered[slot] + tokens
        self._unanswered[slot] = self._unanswered_N[slot] = now
        if not (before and now) and self._loads[slot] < self._spare_load and self._is_here_N[slot]:
            self._num_spare += (not now) - (not before)

    def placed(self, slot: int, adapter: int, tier: int) -> None:
        """The replica reports the adapter in its pool, on its host, or gone."""
        if self._is_here_N[slot]:
            self._set_tier(slot, adapter, None if tier == NOWHERE else tier)

    def sent(self, slot: int, adapter: int, now: float) -> None:
        """A request was sent there."""
        if self._tiers[slot].get(adapter, _RECENT) == _RECENT:
            self._set_tier(slot, adapter, _RECENT)
            self._sent.append((now, slot, adapter))
            self._last_sent[slot, adapter] = now

    # -- the choice ---------------------------------------------------------------------------------------------------

    def best(self, adapter: int, now: float) -> int:
        """Return the slot that `Routing.rank` names first."""
        self._expire(now)
        if not self._num_free:
            return self._least(adapter, self._is_here_N)
        policy, n = self._policy, self._num_free
        max_load = min(policy.max_load(self._sum_load, n), self._limit)
        max_held = policy.bound(self._sum_held, n)
        most, is_exact = policy.excess_tokens, self._num_spare > 0
        recent = crowded = -1
        host = -1
        loads, unanswered = self._loads, self._unanswered
        holders = self._holders.get(adapter, ())
        if len(holders) >= _MANY:
            if not is_exact:
                most, is_exact = self._most_unanswered(max_load), True
            slots_H = self._slots_of(adapter)
            fits_H = (self._load_N[slots_H] < max_load) & (self._unanswered_N[slots_H] <= most)
            holders = [(0, slot) for slot in slots_H[fits_H].tolist()]
        for _, slot in holders:
            if loads[slot] < max_load:
                if unanswered[slot] > most:
                    if is_exact:
                        continue
                    most, is_exact = self._most_unanswered(max_load), True
                    if unanswered[slot] > most:
                        continue
                tier = self._tiers[slot][adapter]
                if tier == POOL:
                    return slot
                if tier == _RECENT:
                    recent = slot if recent < 0 else recent
                elif self._held[slot] < max_held:
                    host = slot if host < 0 else host
                else:
                    crowded = slot if crowded < 0 else crowded
        if host >= 0 or recent >= 0:
            return host if host >= 0 else recent
        if not is_exact:
            most = self._most_unanswered(max_load)
        slot = self._new_home(adapter, max_load, max_held, most)
        if slot >= 0:
            return slot
        if crowded >= 0:
            return crowded
        is_free_N = self._is_here_N & (self._load_N < self._limit)
        within_N = is_free_N & (self._load_N < max_load) & (self._unanswered_N <= most)
        return self._by_hash(adapter, within_N) if within_N.any() else self._least(adapter, is_free_N)

    # -- private ------------------------------------------------------------------------------------------------------

    def _most_unanswered(self, max_load: int) -> int:
        fits_N = self._is_here_N & (self._load_N < max_load)
        return int(np.min(self._unanswered_N, where=fits_N, initial=_MOST)) + self._policy.excess_tokens

    def _new_home(self, adapter: int, max_load: int, max_held: int, most: int) -> int:
        """The first by hash that has not too many requests or adapters and does not hold it; -1 if there is none."""
        for _, slot in self._first_by_hash(adapter):
            if (
                self._loads[slot] < max_load
                and self._held[slot] < max_held
                and self._unanswered[slot] <= most
                and adapter not in self._tiers[slot]
            ):
                return slot
        fits_N = self._is_here_N & (self._load_N < max_load) & (self._held_N < max_held)
        fits_N &= self._unanswered_N <= most
        fits_N[self._slots_of(adapter)] = False
        return self._by_hash(adapter, fits_N) if fits_N.any() else -1

    def _slots_of(self, adapter: int) -> NDArray[np.int64]:
        """Return the slots of its holders, in their order."""
        slots = self._holder_slots.get(adapter)
        if slots is None:
            slots = np.array([slot for _, slot in self._holders.get(adapter, ())], np.int64)
            self._holder_slots[adapter] = slots
        return slots

    def _first_by_hash(self, adapter: int) -> list[tuple[int, int]]:
        """Some replicas, before all others. What is known of the last look is kept up with what has changed since."""
        num_changes, first = self._first.get(adapter, (-1, []))
        if num_changes == len(self._changes):
            return first
        if num_changes >= 0 and len(self._changes) - num_changes <= _MOST_CHANGES:
            key = int(self._adapters[adapter])
            for slot, is_added in self._changes[num_changes:]:
                if is_added:
                    entry = (-mixed(self._hashes[slot] ^ key), slot)
                    if first and entry < first[-1]:
                        insort(first, entry)
                else:
                    first[:] = [entry for entry in first if entry[1] != slot]
            if 2 * len(first) >= min(_NUM_FIRST, self._num_here):
                self._first[adapter] = (len(self._changes), first)
                return first
        return self._find_first(adapter)

    def _find_first(self, adapter: int) -> list[tuple[int, int]]:
        if self._here[0] != len(self._changes):
            here = np.flatnonzero(self._is_here_N)
            self._here = (len(self._changes), here, self._hash_N[here])
        _, here, hashes = self._here
        weights = _mixed(hashes ^ self._adapters[adapter])
        most = min(_NUM_FIRST, len(here))
        if most < len(here):
            last = np.argpartition(weights, len(here) - most)[len(here) - most :]
            here, weights = here[last], weights[last]
        first = sorted((-weight, slot) for weight, slot in zip(weights.tolist(), here.tolist(), strict=True))
        self._first[adapter] = (len(self._changes), first)
        return first

    def _by_hash(self, adapter: int, fits_N: NDArray[np.bool_]) -> int:
        weight_N = _mixed(self._hash_N ^ self._adapters[adapter])
        weight_N[~fits_N] = 0
        return int(weight_N.argmax())

    def _least(self, adapter: int, fits_N: NDArray[np.bool_]) -> int:
        load_N = np.where(fits_N, self._load_N, np.iinfo(np.int64).max)
        return self._by_hash(adapter, load_N == load_N.min())

    def _set_tier(self, slot: int, adapter: int, tier: int | None) -> None:
        tiers = self._tiers[slot]
        before = tiers.get(adapter)
        if tier == before:
            return
        if before is None or tier is None:
            entry = (-mixed(self._hashes[slot] ^ int(self._adapters[adapter])), slot)
            change = 1 if before is None else -1
            self._holder_slots.pop(adapter, None)
            self._held[slot] += change
            self._held_N[slot] += change
            if self._loads[slot] < self._limit:
                self._sum_held += change
            if before is None:
                insort(self._holders.setdefault(adapter, []), entry)
            else:
                holders = self._holders[adapter]
                del holders[bisect_left(holders, entry)]
                if not holders:
                    del self._holders[adapter]
        if tier is None:
            del tiers[adapter]
        else:
            tiers[adapter] = tier

    def _expire(self, now: float) -> None:
        """Forget what was sent long ago and never reported. Times are in order, and only the last of each counts."""
        while self._sent and self._sent[0][0] < now - self._policy.recent_s:
            at, slot, adapter = self._sent.popleft()
            if self._last_sent.get((slot, adapter)) == at:
                del self._last_sent[slot, adapter]
                if self._tiers[slot].get(adapter) == _RECENT:
                    self._set_tier(slot, adapter, None)


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`routing.mixed` of each."""
    bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return np.asarray(bits ^ bits >> np.uint64(31))


class Slots:
    """The replicas that take requests, and the requests on each. A router that looks at adapters overrides `placed`."""

    def __init__(self, size: int) -> None:
        self.slots: list[int] = []
        self.names = [""] * size
        self.loads = [0] * size
        self._position = [0] * size
        self.membership = 0  # changes with every replica that is added or removed

    def added(self, slot: int, name: str) -> None:
        self.names[slot], self.loads[slot], self._position[slot] = name, 0, len(self.slots)
        self.slots.append(slot)
        self.membership += 1

    def removed(self, slot: int) -> None:
        last = self.slots.pop()
        if last != slot:
            self.slots[self._position[slot]] = last
            self._position[last] = self._position[slot]
        self.membership += 1

    def placed(self, replica: int, adapter: int, tier: int) -> None:
        pass

    def load_changed(self, slot: int, load: int) -> None:
        self.loads[slot] = load

    def answered(self, slot: int, job: SimulatedRequest) -> None:
        pass


class SimulatedRouter(Slots):
    """Chooses as loray does (`policy.routing`). Reports of replicas arrive at once."""

    def __init__(self, size: int, num_adapters: int, profile: Profile, policy: RoutingPolicy | None = None) -> None:
        super().__init__(size)
        keys = np.array([hashed(routing_key(digest(a))) for a in range(num_adapters)], np.uint64)
        limit = profile.max_num_seqs + profile.max_queued
        self._index = RoutingIndex(size, keys, limit, policy or RoutingPolicy())

    def added(self, slot: int, name: str) -> None:
        super().added(slot, name)
        self._index.add(slot, name)

    def removed(self, slot: int) -> None:
        super().removed(slot)
        self._index.remove(slot)

    def placed(self, replica: int, adapter: int, tier: int) -> None:
        self._index.placed(replica, adapter, tier)

    def load_changed(self, slot: int, load: int) -> None:
        self._index.set_load(slot, load)

    def choose(self, job: SimulatedRequest, now: float) -> int:
        slot = self._index.best(job.adapter, now)
        self._index.sent(slot, job.adapter, now)
        self._index.add_prompt(slot, job.num_prompt)
        return slot

    def answered(self, slot: int, job: SimulatedRequest) -> None:
        self._index.add_prompt(slot, -job.num_prompt)


class RandomRouter(Slots):
    """Chooses any replica, as where a load balancer stands before independent S-LoRA engines."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__(size)
        self._random = random.Random(seed)

    def choose(self, job: SimulatedRequest, now: float) -> int:
        return self._random.choice(self.slots)


class TwoChoices(RandomRouter):
    """Chooses as Ray Serve does by default: of two replicas drawn at random the one with fewer requests."""

    def choose(self, job: SimulatedRequest, now: float) -> int:
        if len(self.slots) == 1:
            return self.slots[0]
        a, b = self._random.sample(self.slots, 2)
        return a if self.loads[a] <= self.loads[b] else b


class LeastWork(Slots):
    """Chooses the replica that would be done first with all that it has, the outputs' true lengths known."""

    def __init__(self, size: int, profile: Profile) -> None:
        super().__init__(size)
        self._profile = profile
        self._done_at: dict[int, float] = {}
        self._heap: list[tuple[float, int, int]] = []  # with the load's number; a stale one is skipped
        self._numbers = [0] * size

    def added(self, slot: int, name: str) -> None:
        super().added(slot, name)
        self._set(slot, 0.0)

    def removed(self, slot: int) -> None:
        super().removed(slot)
        self._numbers[slot] += 1

    def load_changed(self, slot: int, load: int) -> None:
        super().load_changed(slot, load)
        if not load and self._done_at.get(slot):
            self._set(slot, 0.0)  # the estimate was too high

    def choose(self, job: SimulatedRequest, now: float) -> int:
        while self._heap[0][1] != self._numbers[self._heap[0][2]]:
            heappop(self._heap)
        slot = self._heap[0][2]
        work = self._profile.work_seconds(job.num_prompt, job.num_output)
        self._set(slot, max(self._done_at[slot], now) + work)
        return slot

    def _set(self, slot: int, done_at: float) -> None:
        self._done_at[slot] = done_at
        self._numbers[slot] += 1
        heappush(self._heap, (done_at, self._numbers[slot], slot))


class ProportionalPlacement(Slots):
    """Chooses as NVIDIA Dynamo's proposal for LoRA has it. `slots_each`: adapters that fit into a replica's pool.

    Every 3 seconds each adapter in demand gets a number of replicas: its share of the load times all slots for
    adapters, by largest remainders, at least one and at most all replicas. They are the first in the adapter's
    rendezvous order that have a slot left; those that it has stay. Numbers fall only three periods after they last
    fell. A request goes to the replica of its adapter's set with the fewest requests, which loads the adapter if it has
    to. (The controller's filter leaves out replicas of the set that have not loaded it yet; without something else that
    loads it there, one replica would keep all requests.) An adapter without a set goes to the first replica by hash.

        github.com/ai-dynamo/enhancements, deps/000N-lora-placement; ai-dynamo/dynamo, lib/llm/src/lora/controller.rs
    """

    def __init__(self, size: int, num_adapters: int, slots_each: int, seed: int) -> None:
        super().__init__(size)
        self._slots_each = slots_each
        self._random = random.Random(seed)
        self._keys = np.array([hashed(routing_key(digest(a))) for a in range(num_adapters)], np.uint64)
        self._hash_N = np.zeros(size, np.uint64)
        self._used_N = np.zeros(size, np.int64)  # slots that are in sets
        # The membership, the slots of its replicas, and their hashes.
        self._here = (-1, np.zeros(0, np.int64), np.zeros(0, np.uint64))
        self._sets: dict[int, list[int]] = {}
        self._fell: dict[int, int] = {}  # adapter → the period in which its number last fell
        self._demand: dict[int, float] = {}
        self._arrived: Counter[int] = Counter()
        self._periods: deque[Counter[int]] = deque()
        self._in_window: Counter[int] = Counter()
        self._num_periods, self._next = 0, _PERIOD_S

    def added(self, slot: int, name: str) -> None:
        super().added(slot, name)
        self._hash_N[slot], self._used_N[slot] = hashed(name), 0

    def removed(self, slot: int) -> None:
        super().removed(slot)
        for adapter, chosen in list(self._sets.items()):
            if slot in chosen:
                self._sets[adapter] = [s for s in chosen if s != slot]

    def choose(self, job: SimulatedRequest, now: float) -> int:
        while now >= self._next:
            self._place()
            self._next += _PERIOD_S
        self._arrived[job.adapter] += 1
        chosen = self._sets.get(job.adapter)
        if not chosen:
            here, hashes = self._slots_here()
            return int(here[_weights(hashes, self._keys[job.adapter]).argmax()])
        if len(chosen) > _MOST_COMPARED:
            chosen = self._random.sample(chosen, _MOST_COMPARED)
        return min(chosen, key=self.loads.__getitem__)

    def _place(self) -> None:
        """One period of the controller."""
        self._num_periods += 1
        self._periods.append(self._arrived)
        self._in_window.update(self._arrived)
        self._arrived = Counter()
        if len(self._periods) > _WINDOW_PERIODS:
            self._in_window.subtract(self._periods.popleft())
            self._in_window = +self._in_window
        for adapter in [a for a in self._demand if a not in self._in_window]:
            del self._demand[adapter]
            self._release(self._sets.pop(adapter, []))
        for adapter, n in self._in_window.items():
            before = self._demand.get(adapter, float(n))
            self._demand[adapter] = before + _SMOOTHING * (n - before)
        for adapter, number in self._numbers().items():
            now = self._sets.get(adapter, [])
            if number < len(now):
                if self._num_periods - self._fell.get(adapter, self._num_periods - _COOLDOWN) < _COOLDOWN:
                    continue
                self._fell[adapter] = self._num_periods
            if number != len(now):
                self._sets[adapter] = self._first(adapter, number, now)

    def _numbers(self) -> dict[int, int]:
        """Replicas of each adapter in demand."""
        total, budget = sum(self._demand.values()), self._slots_each * len(self.slots)
        shares = {a: budget * demand / total for a, demand in self._demand.items()}
        numbers = {a: min(max(1, floor(share)), len(self.slots)) for a, share in shares.items()}
        left = budget - sum(numbers.values())
        for adapter in sorted(shares, key=lambda a: (floor(shares[a]) - shares[a], a))[: max(0, left)]:
            numbers[adapter] = min(numbers[adapter] + 1, len(self.slots))
        return numbers

    def _first(self, adapter: int, number: int, now: list[int]) -> list[int]:
        """`number` replicas: those of `now` first, then by hash with a slot left; without one, the first by hash."""
        if number <= len(now):
            self._release(now[number:])
            return now[:number]
        weight_N = _weights(self._hash_N, self._keys[adapter])
        here, _ = self._slots_here()
        here = here[~np.isin(here, now)]
        room = here[self._used_N[here] < self._slots_each]
        among = room if len(room) or now else here
        most = min(number - len(now), len(among))
        if not most:
            return now
        order = np.argsort(weight_N[among])[::-1][:most]
        more = among[order]
        self._used_N[more] += 1
        chosen: list[int] = now + more.tolist()
        return chosen

    def _release(self, slots: list[int]) -> None:
        self._used_N[slots] -= 1

    def _slots_here(self) -> tuple[NDArray[np.int64], NDArray[np.uint64]]:
        """The slots of the replicas, and their hashes."""
        if self._here[0] != self.membership:
            here = np.array(self.slots)
            self._here = (self.membership, here, self._hash_N[here])
        return self._here[1:]


def _weights(hashes: NDArray[np.uint64], key: np.uint64) -> NDArray[np.uint64]:
    """Any mixing of the two hashes does."""
    bits = hashes ^ key
    bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    return np.asarray(bits ^ bits >> np.uint64(27))
