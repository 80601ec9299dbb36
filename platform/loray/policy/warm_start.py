"""The demand that gateways remember, and the adapters that a new replica loads first by it.

Among the replicas that have an adapter in the pool, routing prefers the first in the order of the rendezvous hash, and
where that one has too much load, the second. So a new replica that has loaded the adapters for which it is among the
first takes their requests at once, and the others leave it alone; the rest of the demand stays where it is warm.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from heapq import nlargest
from math import ceil, exp2
from typing import NamedTuple

from loray.policy.routing import RoutingPolicy, is_among_first, routing_key
from loray.spec import AdapterRef

HALF_LIFE_S = 300.0
NUM_KEPT = 512  # of the adapters of one base
_LEAST = 1e-3  # of the largest weight: an adapter that is asked for less is loaded when it is asked for


class AdapterDemand(NamedTuple):
    """`weight`: requests, each of which counts half after HALF_LIFE_S."""

    ref: AdapterRef
    weight: float


@dataclass(frozen=True, slots=True)
class DemandRecord:
    """A gateway's knowledge of a base at `at`, in seconds since the epoch: its replicas, and the demand, most first."""

    at: float
    replicas: tuple[str, ...] = ()
    adapters: tuple[AdapterDemand, ...] = ()


class DemandMemory:
    """A gateway's memory of one base. Times are seconds of one clock."""

    def __init__(self, num_kept: int = NUM_KEPT) -> None:
        self._num_kept = num_kept
        self._weights: dict[str, tuple[AdapterRef, float, float]] = {}  # digest → weight at a time

    def came(self, ref: AdapterRef, now: float) -> None:
        """A request for `ref` came."""
        _, weight, at = self._weights.get(ref.digest, (ref, 0.0, now))
        self._weights[ref.digest] = ref, 1.0 + weight * _decay(now - at), now
        if len(self._weights) > 2 * self._num_kept:
            kept = self.most(now)
            self._weights = {ref.digest: (ref, weight, now) for ref, weight in kept}

    def most(self, now: float) -> list[AdapterDemand]:
        """The adapters with the most demand, the first one first; at most `num_kept`."""
        known = (AdapterDemand(ref, weight * _decay(now - at)) for ref, weight, at in self._weights.values())
        return nlargest(self._num_kept, known, key=lambda demand: demand.weight)


def merged(records: Collection[DemandRecord]) -> DemandRecord:
    """The demand at all gateways, as of the newest record, whose replicas count. At least one record."""
    newest = max(records, key=lambda record: record.at)
    found: dict[str, AdapterDemand] = {}
    for record in records:
        for ref, weight in record.adapters:
            _, known = found.get(ref.digest, (ref, 0.0))
            found[ref.digest] = AdapterDemand(ref, known + weight * _decay(newest.at - record.at))
    return DemandRecord(newest.at, newest.replicas, tuple(sorted(found.values(), key=lambda demand: -demand.weight)))


def _decay(seconds: float) -> float:
    return exp2(-max(0.0, seconds) / HALF_LIFE_S)


def expected(record: DemandRecord, own: str, policy: RoutingPolicy | None = None) -> Iterator[AdapterDemand]:
    """The adapters of `record` whose requests are going to come to the replica `own`, the most in demand first.

    An adapter needs as many replicas as its share of all requests fills, each up to the bound of `policy`.
    """
    factor = (policy or RoutingPolicy()).factor
    others = [replica for replica in record.replicas if replica != own]
    total = sum(demand.weight for demand in record.adapters)
    least = _LEAST * max((demand.weight for demand in record.adapters), default=0.0)
    for demand in record.adapters:
        if demand.weight < least or demand.weight <= 0:
            return
        num_needed = max(1, ceil(demand.weight / total * (len(others) + 1) / factor))
        if is_among_first(routing_key(demand.ref.digest), own, others, num_needed):
            yield demand
