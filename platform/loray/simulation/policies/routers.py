"""How policies choose a replica for a request."""

from __future__ import annotations

import random
from heapq import heappop, heappush

import numpy as np

from loray.serving.routing import RoutingPolicy, hashed
from loray.serving.routing_report import routing_key
from loray.simulation.policies.index import RoutingIndex
from loray.simulation.profile import Profile
from loray.simulation.replica import Job
from loray.simulation.workload.requests import digest


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

    def answered(self, slot: int, job: Job) -> None:
        pass


class AdapterRouter(Slots):
    """loray's: `serving.routing`. Reports of replicas arrive at once."""

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

    def choose(self, job: Job, now: float) -> int:
        slot = self._index.best(job.adapter, now)
        self._index.sent(slot, job.adapter, now)
        self._index.add_prompt(slot, job.num_prompt)
        return slot

    def answered(self, slot: int, job: Job) -> None:
        self._index.add_prompt(slot, -job.num_prompt)


class RandomRouter(Slots):
    """Any replica, as where a load balancer stands before independent S-LoRA engines."""

    def __init__(self, size: int, seed: int) -> None:
        super().__init__(size)
        self._random = random.Random(seed)

    def choose(self, job: Job, now: float) -> int:
        return self._random.choice(self.slots)


class TwoChoices(RandomRouter):
    """Ray Serve's default: of two replicas drawn at random the one with fewer requests."""

    def choose(self, job: Job, now: float) -> int:
        if len(self.slots) == 1:
            return self.slots[0]
        a, b = self._random.sample(self.slots, 2)
        return a if self.loads[a] <= self.loads[b] else b


class LeastWork(Slots):
    """Of all replicas the one that would be done first with all that it has, the outputs' true lengths known."""

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

    def choose(self, job: Job, now: float) -> int:
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
