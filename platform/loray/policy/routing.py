"""How a router chooses a replica for a request, and what replicas report of their adapters.

The order for an adapter: replicas that hold it in the pool, replicas that hold it on the host, replicas to which this
router has just sent it, all others. Within each group, replicas are ordered by the rendezvous hash of adapter and
replica. So routers with the same knowledge make the same choice, a replica that joins or leaves moves only the adapters
placed on it, and the second choice for an adapter is as stable as the first.

    D. Thaler, C. Ravishankar: Using name-based mappings to increase hit rates. IEEE/ACM Trans. Networking 6(1), 1998

Two loads of a replica are bounded, each by c times the mean, and the requests by one more than their mean. A replica
with too many requests is skipped, so an adapter in high demand spreads over as many replicas as it needs, and over
fewer afterwards. A replica with too many adapters gets no new ones and loses those that do not fit into its pool, so a
new replica takes its share of them.

    V. Mirrokni, M. Thorup, M. Zadimoghaddam: Consistent hashing with bounded loads. SODA 2018, arXiv:1608.01350

A request waits for the prompts before it, and one prompt may be a hundred times another. So a replica is skipped too
if the prompts that it has not answered are longer, by more than `excess_tokens`, than those of the replica with the
fewest such tokens. A router knows the prompts that it has sent itself.

A prompt may have been computed before, as far as the last turn of its conversation went, or a system prompt. Replicas
report the names of the prefixes that they hold (`policy.prefixes`), and a router remembers where it has sent which.
Where replicas within the bounds hold a prefix that takes longer to compute than an adapter takes to load, they go
first, by its length; of replicas that are equal for the adapter, the one with the longest prefix.

Reports of the replicas may be missing or old. Without them the hash decides, which is right for most adapters, because
the hash placed them. Requests for the base go to the replica with the lowest load, unless one holds their prefix.

An adapter is named by the first 64 bits of its digest. If two adapters collide, a request goes to the wrong replica,
which serves it all the same.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import islice
from math import ceil
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args, overload

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Reason = Literal["prefix", "pool", "host", "recent", "hash", "overflow", "base"]
REASONS: tuple[Reason, ...] = get_args(Reason)
_TIERS: tuple[Reason, ...] = ("pool", "host", "recent")
_NOT_HELD = len(_TIERS)
# By what is known of the adapter on a replica (one of _TIERS, or _NOT_HELD), and by whether the replica holds too many
# adapters: how it is preferred, the smallest first.
PREFERENCES = ((0, 0), (1, 4), (2, 2), (3, 5))
_BITS = (1 << 64) - 1
_MAX_SENT = 1 << 15  # names of prefixes that are remembered
_MAX_ORDERED = 1 << 18  # positions of replicas that are kept
KEY_DIGITS = 16
MAX_KEYS = 1 << 15  # in one delta: 256 KiB, a fraction of the channel's largest frame
_FORGOTTEN_S = 300.0  # a report that is so old: no policy of routing uses it


@dataclass(frozen=True, slots=True)
class ReplicaView:
    """A replica as a router knows it.

    load              number of requests on it
    limit             number of requests that it accepts
    unanswered        tokens of the prompts that this router has sent to it and whose first token has not come
    in_pool, on_host  routing keys of the adapters that it holds, as reported `age_s` seconds ago
    prefixes          names of prefixes, likewise
    suspect           whether it has just failed a request
    """

    id: str
    load: int
    limit: int
    in_pool: frozenset[str] = frozenset()
    on_host: frozenset[str] = frozenset()
    age_s: float = 0.0
    suspect: bool = False
    unanswered: int = 0
    prefixes: frozenset[str] = frozenset()


class Candidate(NamedTuple):
    replica: str
    reason: Reason


@dataclass(frozen=True, slots=True)
class RoutingPolicy:
    """Parameters of the routing.

    factor     the paper's c
    floor      number of requests that a replica may have in any case. A second request on a replica costs less than
               loading its adapter on another one; with a higher floor, few concurrent requests would all wait for one
               replica while others are idle
    excess     number of requests that a replica may have above the mean. Where queues are long, a quarter of the mean
               is many requests, and waiting for them takes longer than loading the adapter elsewhere
    excess_tokens  of unanswered prompts that a replica may have above the replica with the fewest: about as many as are
               computed in the time of a few loads
    max_age_s  reports that are older are ignored
    min_prefix  names of a prompt's prefix that outweigh where the adapter is: to compute them takes about as long as a
               load
    recent_s   how long the router remembers which adapter and which prompt it sent to a replica
    """

    factor: float = 1.25
    floor: int = 2
    excess: int = 1
    excess_tokens: int = 1024
    min_prefix: int = 4
    max_age_s: float = 30.0
    recent_s: float = 30.0

    def bound(self, total: int, number: int) -> int:
        """The upper bound of each of n loads with sum m once one more is added: ⌈c (m + 1) / n⌉."""
        return ceil(self.factor * (total + 1) / number)

    def max_load(self, total: int, number: int) -> int:
        """The upper bound of requests: at most `excess` above their mean, at least `floor`."""
        return max(min(self.bound(total, number), ceil((total + 1) / number) + self.excess), self.floor)


class Routing:
    """One router's decisions and memory. Times are seconds of any monotonic clock."""

    def __init__(self, policy: RoutingPolicy | None = None) -> None:
        self.policy = policy or RoutingPolicy()
        self._recent: dict[str, OrderedDict[str, float]] = {}  # replica → adapter → time, oldest first
        self._sent: OrderedDict[tuple[str, str], float] = OrderedDict()  # prefix and replica → time, oldest first
        self._ids: list[str] = []  # the replicas of the last choice
        self._orders: dict[str, list[int]] = {}  # adapter → their positions by hash

    def rank(
        self,
        replicas: Sequence[ReplicaView],
        adapter: str | None,
        *,
        now: float,
        tie: str = "",
        prefix: Sequence[str] = (),
    ) -> list[Candidate]:
        """Rank every replica, best first. `adapter` None is the base, for which `tie` decides between equal loads;
        `prefix`: the names of the prompt's prefixes, from the shortest on.
        """
        self._expire(now)
        # Sorting is stable: whatever is equal stays in the order of the hashes.
        ordered = self._by_hash(replicas, tie if adapter is None else adapter, is_adapter=adapter is not None)
        free = [r for r in ordered if not r.suspect and r.load < r.limit]
        last_resort: list[ReplicaView] = []
        if len(free) < len(ordered):
            last_resort = [r for r in ordered if r.suspect or r.load >= r.limit]
            last_resort.sort(key=attrgetter("suspect", "load"))
        if not free:
            return [Candidate(r.id, "base" if adapter is None else "overflow") for r in last_resort]

        max_load = self.policy.max_load(sum([r.load for r in free]), len(free))
        most = min([r.unanswered for r in free if r.load < max_load], default=0) + self.policy.excess_tokens
        num_known = {r.id: self.num_known(r, prefix) for r in free} if prefix else {}
        others = free
        first: list[Candidate] = []
        if num_known:
            # Of equal prefixes those that are first anyway stay so.
            by_prefix, others = sorted(free, key=lambda r: -num_known[r.id]), []
            for r in by_prefix:
                if num_known[r.id] >= self.policy.min_prefix and r.load < max_load and r.unanswered <= most:
                    first.append(Candidate(r.id, "prefix"))
                else:
                    others.append(r)
        if adapter is None:
            return first + [Candidate(r.id, "base") for r in sorted(others, key=attrgetter("load")) + last_resort]
        held = {r.id: self._num_adapters(r) for r in free}
        max_held = self.policy.bound(sum(held.values()), len(held))
        within: list[list[Candidate]] = [[] for _ in range(6)]  # by preference
        beyond: list[ReplicaView] = []
        first_by_hash: Candidate | None = None
        spilled = False
        for r in others:
            tier = self._tier(r, adapter)
            if r.load >= max_load or r.unanswered > most:
                spilled = spilled or tier != _NOT_HELD
                beyond.append(r)
                continue
            candidate = Candidate(r.id, "overflow" if tier == _NOT_HELD else _TIERS[tier])
            if tier == _NOT_HELD and r is free[0]:
                first_by_hash = candidate
            within[PREFERENCES[tier][held[r.id] >= max_held]].append(candidate)
        ranked = first + [candidate for some in within for candidate in some]
        if first_by_hash is not None and not spilled:
            ranked[ranked.index(first_by_hash)] = Candidate(first_by_hash.replica, "hash")
        beyond.sort(key=attrgetter("load"))
        return ranked + [Candidate(r.id, "overflow") for r in beyond + last_resort]

    def sent(self, candidate: Candidate, adapter: str | None, *, now: float, prefix: Sequence[str] = ()) -> None:
        """A request was sent to the candidate, which will hold its adapter and its prefix even before it reports so."""
        for name in reversed(prefix):  # the longest is forgotten first
            self._sent[name, candidate.replica] = now
            self._sent.move_to_end((name, candidate.replica))
        if adapter is None or candidate.reason in ("pool", "host"):
            return
        recent = self._recent.setdefault(candidate.replica, OrderedDict())
        recent[adapter] = now
        recent.move_to_end(adapter)

    def num_known(self, replica: ReplicaView, prefix: Sequence[str]) -> int:
        """Count the names that it holds, or will hold. Where it holds a prefix it holds those before, so that of a long
        prompt few are looked at.
        """
        told = replica.prefixes if replica.age_s <= self.policy.max_age_s else frozenset[str]()
        return bisect_left(prefix, True, key=lambda name: name not in told and (name, replica.id) not in self._sent)

    def reported(self, replica: str, adapters: Collection[str]) -> None:
        """The replica reports that it holds these adapters. From now on only its reports count for them."""
        for adapter in [a for a in self._recent.get(replica, ()) if a in adapters]:
            del self._recent[replica][adapter]

    def retain(self, replicas: Collection[str]) -> None:
        """Forget what was sent to replicas other than these, which no longer exist."""
        self._recent = {replica: recent for replica, recent in self._recent.items() if replica in replicas}
        for key in [key for key in self._sent if key[1] not in replicas]:
            del self._sent[key]

    def _by_hash(self, replicas: Sequence[ReplicaView], key: str, *, is_adapter: bool) -> list[ReplicaView]:
        """The order of an adapter is kept while the replicas are the same."""
        ids = [r.id for r in replicas]
        if ids != self._ids:
            self._ids, self._orders = ids, {}
        order = self._orders.get(key)
        if order is None:
            bits = hashed(key)
            weights = [mixed(bits ^ hashed(name)) for name in ids]
            order = sorted(range(len(ids)), key=weights.__getitem__, reverse=True)
            if is_adapter:
                if len(self._orders) * len(ids) >= _MAX_ORDERED:
                    self._orders.clear()
                self._orders[key] = order
        return [replicas[i] for i in order]

    def _tier(self, replica: ReplicaView, adapter: str) -> int:
        fresh = replica.age_s <= self.policy.max_age_s
        if fresh and adapter in replica.in_pool:
            return 0
        if fresh and adapter in replica.on_host:
            return 1
        return 2 if adapter in self._recent.get(replica.id, ()) else _NOT_HELD

    def _num_adapters(self, replica: ReplicaView) -> int:
        recent = self._recent.get(replica.id, ())
        if replica.age_s > self.policy.max_age_s:
            return len(recent)
        reported = len(replica.in_pool) + len(replica.on_host)
        if not recent:
            return reported
        # A request may have been sent to a holder as overflow, or while the report was on its way.
        return reported + sum(a not in replica.in_pool and a not in replica.on_host for a in recent)

    def _expire(self, now: float) -> None:
        for recent in self._recent.values():
            while recent and next(iter(recent.values())) < now - self.policy.recent_s:
                recent.popitem(last=False)
        while self._sent and (
            len(self._sent) > _MAX_SENT or next(iter(self._sent.values())) < now - self.policy.recent_s
        ):
            self._sent.popitem(last=False)


def is_among_first(adapter: str, replica: str, others: Collection[str], number: int) -> bool:
    """Return whether `replica` is one of the first `number` of it and `others` in the order for a routing key."""
    own = _weight(adapter, replica)
    better = (True for other in others if _weight(adapter, other) > own)
    return sum(islice(better, number)) < number


def _weight(key: str, replica: str) -> int:
    """The rendezvous hash. Unlike `hash`, it is the same in every process."""
    return mixed(hashed(key) ^ hashed(replica))


@lru_cache(maxsize=1 << 16)
def hashed(name: str) -> int:
    """Return 64 bits of a name, of an adapter or a replica."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")


@overload
def mixed(bits: int) -> int: ...
@overload
def mixed(bits: NDArray[np.uint64]) -> NDArray[np.uint64]: ...
def mixed(bits: Any) -> Any:
    """Permute 64 bits, so that every output bit depends on all input bits (splitmix64's last part); each element's of
    an array.
    """
    bits = (bits ^ bits >> 30) * 0xBF58476D1CE4E5B9 & _BITS
    bits = (bits ^ bits >> 27) * 0x94D049BB133111EB & _BITS
    return bits ^ bits >> 31


def routing_key(digest: str) -> str:
    """Return the first 16 hex digits of a digest, which are unique among millions of adapters."""
    return digest[:KEY_DIGITS]


class Held(NamedTuple):
    """The adapters in a replica's pool, and those only on its host, by digest; and the prefixes that it tells of."""

    in_pool: Collection[str] = ()
    on_host: Collection[str] = ()
    prefixes: Collection[str] = ()


@dataclass(frozen=True, slots=True)
class RoutingDelta:
    """The changes since the delta before it. Adapters are named by their routing keys, each at most once.

    Deltas form a series, one for each connection of a replica to a gateway, and are numbered in it. So a gateway knows
    when it has missed one, and asks for everything again; and the deltas of a replica are never applied to what its
    predecessor, or an older connection, has said. The number of requests is not part of it: that changes constantly.

    series, number    deltas of one series are numbered one after the other
    is_whole          what was said before counts no more
    in_pool, on_host  adapters that are in the pool now; only on the host now
    gone              adapters that are on neither now
    prefixes          names of prefixes that it holds now; prefixes_gone: and no more
    """

    series: str
    number: int
    is_whole: bool
    in_pool: tuple[str, ...] = ()
    on_host: tuple[str, ...] = ()
    gone: tuple[str, ...] = ()
    prefixes: tuple[str, ...] = ()
    prefixes_gone: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class RoutingReport:
    """The adapters in the pool, and those only on the host, by routing key, and the prefixes, after delta `number` of
    `series`.
    """

    series: str
    number: int
    in_pool: frozenset[str] = frozenset()
    on_host: frozenset[str] = frozenset()
    prefixes: frozenset[str] = frozenset()


def apply(report: RoutingReport | None, delta: RoutingDelta) -> RoutingReport | None:
    """Return the report after `delta`; None if the delta does not follow `report`, and the whole is needed."""
    in_pool: frozenset[str] = frozenset()
    on_host = prefixes = in_pool
    if not delta.is_whole:
        if report is None or (delta.series, delta.number) != (report.series, report.number + 1):
            return None
        in_pool, on_host, prefixes = report.in_pool, report.on_host, report.prefixes
    moved = {*delta.in_pool, *delta.on_host, *delta.gone}
    return RoutingReport(
        delta.series,
        delta.number,
        (in_pool - moved).union(delta.in_pool),
        (on_host - moved).union(delta.on_host),
        prefixes.difference(delta.prefixes_gone).union(delta.prefixes),
    )


class RoutingSeries:
    """A replica's side of one series: it knows what it has told."""

    def __init__(self, name: str) -> None:
        """`name`: no other series of any replica has it."""
        self._name = name
        self._number = -1
        self._held = Held()
        self._told: tuple[frozenset[str], frozenset[str], frozenset[str]] | None = None  # of `_held`

    def restart(self) -> None:
        """The next deltas tell everything again."""
        self._told = None

    def deltas(self, held: Held) -> list[RoutingDelta]:
        """Return what is to be sent now, in this order; nothing if nothing has changed."""
        if self._told is not None and held == self._held:  # the same digests in the same order: quick to see
            return []
        self._held = held
        in_pool = frozenset(map(routing_key, held.in_pool))
        on_host = frozenset(map(routing_key, held.on_host)) - in_pool
        is_whole = self._told is None
        was_in_pool, was_on_host, were_prefixes = self._told or (frozenset[str](),) * 3
        prefixes = frozenset(held.prefixes)
        self._told = in_pool, on_host, prefixes
        gone = (was_in_pool | was_on_host) - in_pool - on_host
        kinds = (in_pool - was_in_pool, on_host - was_on_host, gone, prefixes - were_prefixes, were_prefixes - prefixes)
        keys = [(kind, key) for kind, of_kind in enumerate(kinds) for key in sorted(of_kind)]
        deltas: list[RoutingDelta] = []
        for start in range(0, max(len(keys), is_whole), MAX_KEYS):
            part = keys[start : start + MAX_KEYS]
            named = (tuple(key for kind, key in part if kind == wanted) for wanted in range(len(kinds)))
            self._number += 1
            deltas.append(RoutingDelta(self._name, self._number, is_whole and not start, *named))
        return deltas


class Known(NamedTuple):
    """`at`: when the replica last gave a sign of life. `num_of_others`: requests of other gateways that it has."""

    report: RoutingReport
    at: float
    num_of_others: int = 0


class RoutingReports:
    """A gateway's knowledge of its replicas. Times are seconds of any monotonic clock.

    One thread writes; others may read meanwhile.
    """

    def __init__(self) -> None:
        self._known: dict[str, Known] = {}

    def of(self, replica: str) -> Known | None:
        return self._known.get(replica)

    def take(self, replica: str, delta: RoutingDelta, now: float) -> bool:
        """Apply a delta; False if one was missed before it: the replica must tell everything again."""
        known = self._known.get(replica)
        report = apply(None if known is None else known.report, delta)
        if report is None:
            return False
        if known is None:
            for other in [r for r, k in self._known.items() if k.at < now - _FORGOTTEN_S]:
                del self._known[other]
        self._known[replica] = Known(report, now, 0 if known is None or delta.is_whole else known.num_of_others)
        return True

    def alive(self, replica: str, now: float) -> None:
        """The replica still gives signs of life: nothing has changed."""
        if (known := self._known.get(replica)) is not None:
            self._known[replica] = known._replace(at=now)

    def loaded(self, replica: str, num_of_others: int, now: float) -> None:
        """The replica has so many requests of other gateways: none after a whole report, until it says so."""
        if (known := self._known.get(replica)) is not None:
            self._known[replica] = known._replace(at=now, num_of_others=num_of_others)
