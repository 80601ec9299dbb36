"""Which adapters a replica that starts loads before it takes requests: those that routing sends to it when it has them.

Among the replicas that have an adapter in the pool, routing prefers the first in the order of the rendezvous hash, and
where that one has too much load, the second. So a new replica that has loaded the adapters for which it is among the
first takes their requests at once, and the others leave it alone; the rest of the demand stays where it is warm.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil

from loray.serving.adapter_demand import AdapterDemand, DemandRecord
from loray.serving.routing import RoutingPolicy, is_among_first
from loray.serving.routing_report import routing_key

_LEAST = 1e-3  # of the largest weight: an adapter that is asked for less is loaded when it is asked for


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
