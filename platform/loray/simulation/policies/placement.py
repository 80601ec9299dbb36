"""Placement in proportion to demand, as NVIDIA Dynamo's LoRA controller describes and does it.

Every 3 seconds each adapter in demand gets a number of replicas: its share of the load times all slots for adapters,
by largest remainders, at least one and at most all replicas. They are the first in the adapter's rendezvous order
that have a slot left; those that it has stay. Numbers fall only three periods after they last fell. A request goes to
the replica of its adapter's set with the fewest requests, which loads the adapter if it has to, as the proposal has it.
(The controller's filter leaves out replicas of the set that have not loaded it yet; without something else that loads
it there, one replica would keep all requests.) An adapter without a set goes to the first replica by hash.

    github.com/ai-dynamo/enhancements, deps/000N-lora-placement; ai-dynamo/dynamo, lib/llm/src/lora/controller.rs
"""

from __future__ import annotations

import random
from collections import Counter, deque
from math import floor

import numpy as np
from numpy.typing import NDArray

from loray.serving.routing import hashed
from loray.serving.routing_report import routing_key
from loray.simulation.policies.routers import Slots
from loray.simulation.replica import Job
from loray.simulation.workload.requests import digest

_PERIOD_S, _WINDOW_PERIODS, _COOLDOWN, _SMOOTHING = 3.0, 30, 3, 0.3  # the controller's defaults
_MOST_COMPARED = 32  # of a larger set so many are drawn


class ProportionalPlacement(Slots):
    """`slots_each`: adapters that fit into a replica's pool."""

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

    def choose(self, job: Job, now: float) -> int:
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
