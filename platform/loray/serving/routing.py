"""Which replica serves a request: where its adapter is, as long as that replica is not asked for too much.

For an adapter, in this order: replicas that hold it in the pool, that hold it on the host, to which this router has
just sent it, and the rest. Within each step, by rendezvous hash of adapter × replica, so that every router makes the
same choice, a replica that joins or leaves moves only its own adapters, and a second home is as stable as the first.

    D. Thaler, C. Ravishankar: Using name-based mappings to increase hit rates. IEEE/ACM Trans. Networking 6(1), 1998

Two loads are bounded, each by c times its mean: a replica with too many requests is passed over, so that a hot adapter
has as many homes as it needs and falls back to fewer afterwards; and one with too many adapters gets no new ones and
loses those that its pool has no room for, so that a replica that joins takes its share of them.

    V. Mirrokni, M. Thorup, M. Zadimoghaddam: Consistent hashing with bounded loads. SODA 2018, arXiv:1608.01350

What is known of the replicas may be missing or old. Without it the hash alone decides, and it still is right for most
adapters, because it was the hash that placed them. Requests for the base go where there is least to do.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import ceil
from typing import Literal, NamedTuple, get_args

Reason = Literal["pool", "host", "recent", "hash", "overflow", "base"]
REASONS: tuple[Reason, ...] = get_args(Reason)
_TIERS: tuple[Reason, ...] = ("pool", "host", "recent")
_NOT_HELD = len(_TIERS)


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """A replica as a router sees it. `in_pool` and `on_host` hold adapters' keys, reported `age_s` seconds ago.

    `load` is the number of requests that it has, `limit` how many it takes; `suspect`: it has just failed a request.
    """

    id: str
    load: int
    limit: int
    in_pool: frozenset[str] = frozenset()
    on_host: frozenset[str] = frozenset()
    age_s: float = 0.0
    suspect: bool = False


class Candidate(NamedTuple):
    replica: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class RoutingPolicy:
    """`factor` is the paper's c. `floor`: requests that a replica may have in any case: a second one costs less than a
    second home for its adapter, and with more, few requests at once would all wait for one replica while others idle.

    A report older than `max_age_s` counts for nothing; what was sent to a replica is remembered for `recent_s`.
    """

    factor: float = 1.25
    floor: int = 2
    max_age_s: float = 30.0
    recent_s: float = 30.0

    def bound(self, loads: Collection[int], floor: int = 0) -> int:
        """What one of these may have, with the one that comes: ⌈c (m + 1) / n⌉. Always more than the mean."""
        return max(ceil(self.factor * (sum(loads) + 1) / len(loads)), floor)


class Routing:
    """One router's decisions and what it remembers. Times are seconds of any clock that only goes forward."""

    def __init__(self, policy: RoutingPolicy | None = None) -> None:
        self.policy = policy or RoutingPolicy()
        self._recent: dict[str, OrderedDict[str, float]] = {}  # replica → adapter → when, oldest first

    def rank(
        self, replicas: Sequence[ReplicaView], adapter: str | None, *, now: float, tie: str = ""
    ) -> list[Candidate]:
        """Every replica once, best first. `adapter` None: the base, spread by `tie` where loads are equal."""
        self._expire(now)
        free = [r for r in replicas if not r.suspect and r.load < r.limit]
        last_resort = [r for r in replicas if r.suspect or r.load >= r.limit]
        key = tie if adapter is None else adapter
        ranks = {r.id: i for i, r in enumerate(sorted(replicas, key=lambda r: -_weight(key, r.id)))}
        least_loaded = sorted(free, key=lambda r: (r.load, ranks[r.id]))
        last_resort.sort(key=lambda r: (r.suspect, r.load, ranks[r.id]))
        if adapter is None:
            return [Candidate(r.id, "base") for r in least_loaded + last_resort]
        if not free:
            return [Candidate(r.id, "overflow") for r in last_resort]

        max_load = self.policy.bound([r.load for r in free], self.policy.floor)
        tiers = {r.id: self._tier(r, adapter) for r in free}
        held = {r.id: self._num_adapters(r) for r in free}
        max_held = self.policy.bound(held.values())
        within = sorted(
            (r for r in free if r.load < max_load),
            key=lambda r: (_preference(tiers[r.id], held[r.id] >= max_held), ranks[r.id]),
        )
        spilled = any(r.load >= max_load and tiers[r.id] != _NOT_HELD for r in free)
        home = min(free, key=lambda r: ranks[r.id])
        elsewhere: Reason = "overflow"

        def reason(r: ReplicaView) -> Reason:
            if tiers[r.id] != _NOT_HELD:
                return _TIERS[tiers[r.id]]
            return "hash" if r is home and not spilled else elsewhere

        beyond = [r for r in least_loaded if r.load >= max_load] + last_resort
        return [Candidate(r.id, reason(r)) for r in within] + [Candidate(r.id, elsewhere) for r in beyond]

    def sent(self, candidate: Candidate, adapter: str | None, *, now: float) -> None:
        """A request was sent there: it will hold the adapter, whether or not it has said so by the next request."""
        if adapter is None or candidate.reason in ("pool", "host"):
            return
        recent = self._recent.setdefault(candidate.replica, OrderedDict())
        recent[adapter] = now
        recent.move_to_end(adapter)

    def reported(self, replica: str, adapters: Collection[str]) -> None:
        """The replica says that it holds these: from now on its reports tell when they are gone."""
        for adapter in [a for a in self._recent.get(replica, ()) if a in adapters]:
            del self._recent[replica][adapter]

    def retain(self, replicas: Collection[str]) -> None:
        """Forget what was sent to others than these: they are gone."""
        self._recent = {replica: recent for replica, recent in self._recent.items() if replica in replicas}

    def _tier(self, replica: ReplicaView, adapter: str) -> int:
        fresh = replica.age_s <= self.policy.max_age_s
        if fresh and adapter in replica.in_pool:
            return 0
        if fresh and adapter in replica.on_host:
            return 1
        return 2 if adapter in self._recent.get(replica.id, ()) else _NOT_HELD

    def _num_adapters(self, replica: ReplicaView) -> int:
        fresh = replica.age_s <= self.policy.max_age_s
        reported = len(replica.in_pool) + len(replica.on_host) if fresh else 0
        return reported + len(self._recent.get(replica.id, ()))

    def _expire(self, now: float) -> None:
        for recent in self._recent.values():
            while recent and next(iter(recent.values())) < now - self.policy.recent_s:
                recent.popitem(last=False)


def _preference(tier: int, crowded: bool) -> int:
    """Smaller is better. `crowded`: the replica holds too many adapters."""
    if tier == _TIERS.index("host") and crowded:
        return _NOT_HELD + 1
    return tier if tier != _NOT_HELD else _NOT_HELD + 2 * crowded


def _weight(key: str, replica: str) -> int:
    """The same in every process and Python, unlike `hash`."""
    return int.from_bytes(blake2b(f"{key}\0{replica}".encode(), digest_size=8).digest(), "big")
