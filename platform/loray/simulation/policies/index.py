"""The first choice of `serving.routing.Routing.rank`, from sums and indexes that are kept as replicas change.

`rank` looks at every replica for every request. Here a request for an adapter that is held looks at its holders, in the
order of their hashes, until one is within bounds; only one that no such replica holds looks at all, as columns. A test
holds both to the same choices.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

import numpy as np
from numpy.typing import NDArray

from loray.serving.routing import RoutingPolicy, hashed, mixed

_RECENT, _NUM_FIRST = 2, 8
_POOL, _HOST, _NOWHERE = 0, 1, 2
_MOST = 1 << 62


class RoutingIndex:
    """What a router knows of the replicas in its slots, and of the adapters that they hold.

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
        self._max_unanswered = -1  # for the request that is routed; below 0: not computed yet
        self._num_here = self._num_free = self._sum_load = self._sum_held = 0  # the sums are of those below the limit
        self._holders: dict[int, list[tuple[int, int]]] = {}  # adapter → (negative weight, slot), sorted
        self._tiers: list[dict[int, int]] = [{} for _ in range(size)]  # adapter → tier
        self._sent: deque[tuple[float, int, int]] = deque()
        self._first: dict[int, tuple[int, list[int]]] = {}  # adapter → the membership, its first replicas by hash
        self._membership = 0
        # The membership, the slots of its replicas, and their hashes.
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
        self._membership += 1

    def remove(self, slot: int) -> None:
        for adapter in list(self._tiers[slot]):
            self._set_tier(slot, adapter, None)
        if self._loads[slot] < self._limit:
            self._num_free -= 1
            self._sum_load -= self._loads[slot]
        self._is_here_N[slot] = False
        self._num_here -= 1
        self._membership += 1

    def set_load(self, slot: int, load: int) -> None:
        before = self._loads[slot]
        self._loads[slot] = load
        self._load_N[slot] = load
        was_free, is_free = before < self._limit, load < self._limit
        self._sum_load += load * is_free - before * was_free
        if was_free != is_free:
            change = is_free - was_free
            self._num_free += change
            self._sum_held += change * self._held[slot]

    def add_prompt(self, slot: int, tokens: int) -> None:
        """A prompt of so many tokens was sent there; with fewer than none, one has been answered."""
        self._unanswered[slot] += tokens
        self._unanswered_N[slot] = self._unanswered[slot]

    def placed(self, slot: int, adapter: int, tier: int) -> None:
        """The replica reports the adapter in its pool, on its host, or gone."""
        if self._is_here_N[slot]:
            self._set_tier(slot, adapter, None if tier == _NOWHERE else tier)

    def sent(self, slot: int, adapter: int, now: float) -> None:
        """A request was sent there."""
        if self._tiers[slot].get(adapter, _RECENT) == _RECENT:
            self._set_tier(slot, adapter, _RECENT)
            self._sent.append((now, slot, adapter))

    # -- the choice ---------------------------------------------------------------------------------------------------

    def best(self, adapter: int, now: float) -> int:
        """The slot that `Routing.rank` names first."""
        self._expire(now)
        if not self._num_free:
            return self._least(adapter, self._is_here_N)
        policy, n = self._policy, self._num_free
        max_load = min(policy.max_load(self._sum_load, n), self._limit)
        max_held = policy.bound(self._sum_held, n)
        self._max_unanswered = -1
        recent = crowded = -1
        host = -1
        for _, slot in self._holders.get(adapter, ()):
            if self._loads[slot] < max_load and self._answers(slot, max_load):
                tier = self._tiers[slot][adapter]
                if tier == _POOL:
                    return slot
                if tier == _RECENT:
                    recent = slot if recent < 0 else recent
                elif self._held[slot] < max_held:
                    host = slot if host < 0 else host
                else:
                    crowded = slot if crowded < 0 else crowded
        if host >= 0 or recent >= 0:
            return host if host >= 0 else recent
        slot = self._new_home(adapter, max_load, max_held)
        if slot >= 0:
            return slot
        if crowded >= 0:
            return crowded
        is_free_N = self._is_here_N & (self._load_N < self._limit)
        within_N = is_free_N & (self._load_N < max_load) & self._answering(max_load)
        return self._by_hash(adapter, within_N) if within_N.any() else self._least(adapter, is_free_N)

    # -- private ------------------------------------------------------------------------------------------------------

    def _answers(self, slot: int, max_load: int) -> bool:
        """Whether its unanswered prompts are within the bound, which need not be known where they are short."""
        tokens = self._unanswered[slot]
        return tokens <= self._policy.excess_tokens or tokens <= self._most_unanswered(max_load)

    def _answering(self, max_load: int) -> NDArray[np.bool_]:
        return self._unanswered_N <= self._most_unanswered(max_load)

    def _most_unanswered(self, max_load: int) -> int:
        """Computed once for a request."""
        if self._max_unanswered < 0:
            fits_N = self._is_here_N & (self._load_N < max_load)
            least = int(np.min(self._unanswered_N, where=fits_N, initial=_MOST))
            self._max_unanswered = least + self._policy.excess_tokens
        return self._max_unanswered

    def _new_home(self, adapter: int, max_load: int, max_held: int) -> int:
        """The first by hash that has not too many requests or adapters and does not hold it; -1 if there is none."""
        membership, first = self._first.get(adapter, (-1, []))
        if membership != self._membership:
            first = self._first_by_hash(adapter)
            self._first[adapter] = (self._membership, first)
        for slot in first:
            if (
                self._loads[slot] < max_load
                and self._held[slot] < max_held
                and self._answers(slot, max_load)
                and adapter not in self._tiers[slot]
            ):
                return slot
        fits_N = self._is_here_N & (self._load_N < max_load) & (self._held_N < max_held)
        fits_N &= self._answering(max_load)
        for _, slot in self._holders.get(adapter, ()):
            fits_N[slot] = False
        return self._by_hash(adapter, fits_N) if fits_N.any() else -1

    def _first_by_hash(self, adapter: int) -> list[int]:
        if self._here[0] != self._membership:
            here = np.flatnonzero(self._is_here_N)
            self._here = (self._membership, here, self._hash_N[here])
        _, here, hashes = self._here
        weights = _mixed(hashes ^ self._adapters[adapter])
        most = min(_NUM_FIRST, len(here))
        first = np.argpartition(weights, len(here) - most)[len(here) - most :]
        ordered: list[int] = here[first[np.argsort(weights[first])[::-1]]].tolist()
        return ordered

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
        """What was sent long ago and never reported: the times are in order, and only the last of each counts."""
        while self._sent and self._sent[0][0] < now - self._policy.recent_s:
            _, slot, adapter = self._sent.popleft()
            if self._tiers[slot].get(adapter) == _RECENT and not any(s[1:] == (slot, adapter) for s in self._sent):
                self._set_tier(slot, adapter, None)


def _mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """`routing.mixed` of each."""
    bits = (bits ^ bits >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ bits >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return np.asarray(bits ^ bits >> np.uint64(31))
