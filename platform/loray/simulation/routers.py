"""Routers: how the policies that are compared choose a replica."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from math import floor

import numpy as np
from numpy.typing import NDArray

from loray.policy.prefixes import TOLD_BLOCKS
from loray.policy.routing import PREFERENCES, RoutingPolicy, hashed, mixed, routing_key
from loray.simulation.cluster import HOST, NOWHERE, POOL, SimulatedRequest
from loray.simulation.profile import Profile
from loray.simulation.workload import Bools, Floats, Ints, digest

Hashes = NDArray[np.uint64]

_PERIOD_S, _WINDOW_PERIODS, _COOLDOWN, _SMOOTHING = 3.0, 30, 3, 0.3  # of Dynamo's controller, its defaults
_MOST_COMPARED = 32  # of a larger set so many are drawn

# What loray's router knows of an adapter on a replica, in the order of the policy's preferences but for the first.
_NOT_HELD, _IN_POOL, _ON_HOST, _SENT = range(4)
_KNOWN = {POOL: _IN_POOL, HOST: _ON_HOST, NOWHERE: _NOT_HELD}
_PREFERENCES = np.array(PREFERENCES[-1:] + PREFERENCES[:-1])
_PREFIX, _LAST = -1, 6
_MOST = np.iinfo(np.int64).max
_NAME_TOKENS = 16 * TOLD_BLOCKS  # of a prompt for each name of its prefix


class Slots:
    """The replicas that take requests, and the requests on each: columns of N slots. A router that looks at adapters
    overrides `placed`, one that looks at conversations `said`.
    """

    def __init__(self, size: int) -> None:
        self.slots: list[int] = []  # of the replicas that are here
        self.taken = slice(0)  # no slot after these has ever been taken
        self.is_here_N: Bools = np.zeros(size, bool)
        self.load_N: Ints = np.zeros(size, np.int64)
        self.hash_N: Hashes = np.zeros(size, np.uint64)

    def added(self, slot: int, name: str) -> None:
        self.slots.append(slot)
        self.taken = slice(max(self.taken.stop, slot + 1))
        self.is_here_N[slot], self.load_N[slot], self.hash_N[slot] = True, 0, hashed(name)

    def removed(self, slot: int) -> None:
        self.slots.remove(slot)
        self.is_here_N[slot] = False

    def placed(self, replica: int, adapter: int, tier: int) -> None:
        pass

    def said(self, replica: int, talk: int, num_tokens: int) -> None:
        pass

    def load_changed(self, slot: int, load: int) -> None:
        self.load_N[slot] = load

    def answered(self, slot: int, job: SimulatedRequest) -> None:
        pass

    def first_by_hash(self, key: np.uint64, fits_N: Bools) -> int:
        """Return the first in the rendezvous order of an adapter's key among those that fit, of which there is one.
        `fits_N` is about the slots that have been taken.
        """
        return int(np.where(fits_N, mixed(self.hash_N[self.taken] ^ key), 0).argmax())


def keys_of(num_adapters: int) -> Hashes:
    """Return 64 bits of each adapter's routing key, see `routing.hashed`."""
    return np.array([hashed(routing_key(digest(a))) for a in range(num_adapters)], np.uint64)


class SimulatedRouter(Slots):
    """Chooses as loray does: the slot that `Routing.rank` names first. Reports of replicas arrive at once.

    `Routing.rank` looks at one replica after the other; here each look is a column. A test holds both to the same
    choices.

    sees_prefixes  False: it looks at adapters and loads alone
    """

    def __init__(
        self,
        size: int,
        num_adapters: int,
        profile: Profile,
        policy: RoutingPolicy | None = None,
        *,
        sees_prefixes: bool = True,
    ) -> None:
        super().__init__(size)
        self._sees_prefixes = sees_prefixes
        self._said: dict[int, dict[int, int]] = {}  # names of its prefix by conversation and slot
        self._policy = policy or RoutingPolicy()
        self._limit = profile.max_num_seqs + profile.max_queued
        self._keys = keys_of(num_adapters)
        self._known_AN = np.zeros((num_adapters, size), np.int8)
        self._held_N: Ints = np.zeros(size, np.int64)  # adapters
        self._unanswered_N: Ints = np.zeros(size, np.int64)  # tokens of prompts
        self._sent: OrderedDict[tuple[int, int], float] = OrderedDict()  # slot and adapter → time, oldest first

    def added(self, slot: int, name: str) -> None:
        super().added(slot, name)
        self._unanswered_N[slot] = 0

    def removed(self, slot: int) -> None:
        super().removed(slot)
        for adapter in np.flatnonzero(self._known_AN[:, slot]).tolist():
            self._set_known(slot, adapter, _NOT_HELD)
        for where in self._said.values():
            where.pop(slot, None)

    def placed(self, replica: int, adapter: int, tier: int) -> None:
        if self.is_here_N[replica]:
            self._set_known(replica, adapter, _KNOWN[tier])

    def said(self, replica: int, talk: int, num_tokens: int) -> None:
        where, names = self._said.setdefault(talk, {}), num_tokens // _NAME_TOKENS
        if names and self.is_here_N[replica]:
            where[replica] = names
        else:
            where.pop(replica, None)
        if not where:
            del self._said[talk]

    def choose(self, job: SimulatedRequest, now: float) -> int:
        self._expire(now)
        said = self._said.get(job.talk) if job.talk is not None and self._sees_prefixes else None
        slot = self._best(job.adapter, said)
        if said is not None:
            job.num_expected = min(_NAME_TOKENS * said.get(slot, 0), job.num_prompt)
        if self._known_AN[job.adapter, slot] in (_NOT_HELD, _SENT):
            self._set_known(slot, job.adapter, _SENT)
            self._sent[slot, job.adapter] = now
            self._sent.move_to_end((slot, job.adapter))
        self._unanswered_N[slot] += job.num_prompt - job.num_expected
        return slot

    def answered(self, slot: int, job: SimulatedRequest) -> None:
        self._unanswered_N[slot] -= job.num_prompt - job.num_expected

    def _best(self, adapter: int, said: Mapping[int, int] | None) -> int:
        policy, key, taken = self._policy, self._keys[adapter], self.taken
        load_N, held_N, unanswered_N = self.load_N[taken], self._held_N[taken], self._unanswered_N[taken]
        free_N = self.is_here_N[taken] & (load_N < self._limit)
        num_free = int(np.count_nonzero(free_N))
        if not num_free:
            return self._least_loaded(key, self.is_here_N[taken])
        max_load = policy.max_load(int(load_N[free_N].sum()), num_free)
        max_held = policy.bound(int(held_N[free_N].sum()), num_free)
        within_N = free_N & (load_N < max_load)
        fewest = int(unanswered_N.min(where=within_N, initial=_MOST - policy.excess_tokens))
        within_N &= unanswered_N <= fewest + policy.excess_tokens
        if not within_N.any():
            return self._least_loaded(key, free_N)
        preference_N = _PREFERENCES[self._known_AN[adapter, taken], (held_N >= max_held).view(np.int8)]
        if said is not None:
            names_N = np.zeros(len(load_N), np.int64)
            names_N[list(said)] = list(said.values())
            preference_N[names_N >= policy.min_prefix] = _PREFIX
            preference_N[~within_N] = _LAST
            names_N[preference_N != preference_N.min()] = -1
            return self.first_by_hash(key, names_N == names_N.max())
        preference_N[~within_N] = _LAST
        return self.first_by_hash(key, preference_N == preference_N.min())

    def _least_loaded(self, key: np.uint64, fits_N: Bools) -> int:
        load_N = self.load_N[self.taken]
        return self.first_by_hash(key, fits_N & (load_N == load_N.min(where=fits_N, initial=_MOST)))

    def _set_known(self, slot: int, adapter: int, known: int) -> None:
        before = self._known_AN[adapter, slot]
        self._held_N[slot] += (known != _NOT_HELD) - int(before != _NOT_HELD)
        self._known_AN[adapter, slot] = known

    def _expire(self, now: float) -> None:
        """Forget what was sent long ago and never reported."""
        while self._sent and next(iter(self._sent.values())) < now - self._policy.recent_s:
            (slot, adapter), _ = self._sent.popitem(last=False)
            if self._known_AN[adapter, slot] == _SENT:
                self._set_known(slot, adapter, _NOT_HELD)


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
        return min(self._random.sample(self.slots, 2), key=self.load_N.__getitem__)


class LeastWork(Slots):
    """Chooses the replica that would be done first with all that it has, the outputs' true lengths known."""

    def __init__(self, size: int, profile: Profile) -> None:
        super().__init__(size)
        self._profile = profile
        self._done_N: Floats = np.zeros(size)  # seconds

    def added(self, slot: int, name: str) -> None:
        super().added(slot, name)
        self._done_N[slot] = 0.0

    def load_changed(self, slot: int, load: int) -> None:
        super().load_changed(slot, load)
        if not load:
            self._done_N[slot] = 0.0  # the estimate was too high

    def choose(self, job: SimulatedRequest, now: float) -> int:
        slot = int(np.where(self.is_here_N[self.taken], self._done_N[self.taken], np.inf).argmin())
        self._done_N[slot] = max(self._done_N[slot], now) + self._profile.work_seconds(job.num_prompt, job.num_output)
        return slot


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
        self._keys = keys_of(num_adapters)
        self._used_N: Ints = np.zeros(size, np.int64)  # slots that are in sets
        self._sets: dict[int, list[int]] = {}
        self._fell: dict[int, int] = {}  # adapter → the period in which its number last fell
        self._demand: dict[int, float] = {}
        self._arrived: Counter[int] = Counter()
        self._periods: deque[Counter[int]] = deque()
        self._in_window: Counter[int] = Counter()
        self._num_periods, self._next = 0, _PERIOD_S

    def added(self, slot: int, name: str) -> None:
        super().added(slot, name)
        self._used_N[slot] = 0

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
            return self.first_by_hash(self._keys[job.adapter], self.is_here_N[self.taken])
        if len(chosen) > _MOST_COMPARED:
            chosen = self._random.sample(chosen, _MOST_COMPARED)
        return min(chosen, key=self.load_N.__getitem__)

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
        here = np.flatnonzero(self.is_here_N)
        here = here[~np.isin(here, now)]
        room = here[self._used_N[here] < self._slots_each]
        among = room if len(room) or now else here
        order = np.argsort(mixed(self.hash_N[among] ^ self._keys[adapter]))[::-1][: number - len(now)]
        more = among[order]
        self._used_N[more] += 1
        return [*now, *more.tolist()]

    def _release(self, slots: list[int]) -> None:
        self._used_N[slots] -= 1
