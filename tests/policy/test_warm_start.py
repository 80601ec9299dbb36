"""What gateways remember of the demand, and which adapters a replica that starts expects: those routing sends to it."""

from __future__ import annotations

from collections.abc import Sequence

from loray.policy.routing import ReplicaView, Routing, routing_key
from loray.policy.warm_start import HALF_LIFE_S, AdapterDemand, DemandMemory, DemandRecord, expected, merged
from loray.spec import AdapterRef
from tests.fixtures.demand import adapter

OLD = ("one", "two", "three")


def record(weights: Sequence[float], replicas: Sequence[str] = OLD, at: float = 1000.0) -> DemandRecord:
    demands = (AdapterDemand(adapter(i), weight) for i, weight in enumerate(weights))
    return DemandRecord(at, tuple(replicas), tuple(demands))


def names(demands: Sequence[AdapterDemand]) -> list[AdapterRef]:
    return [demand.ref for demand in demands]


def test_a_new_replica_expects_its_share_and_routing_then_sends_it_exactly_that() -> None:
    """Every old replica has every adapter in its pool; the new one has loaded what it expects."""
    seen = record([1.0] * 200)
    mine = {routing_key(demand.ref.digest) for demand in expected(seen, "new")}
    assert 30 <= len(mine) <= 70
    every = frozenset(routing_key(demand.ref.digest) for demand in seen.adapters)
    views = [ReplicaView(name, 0, 100, in_pool=every) for name in OLD]
    views.append(ReplicaView("new", 0, 100, in_pool=frozenset(mine)))
    routing = Routing()
    to_new = {key for key in every if routing.rank(views, key, now=0.0)[0].replica == "new"}
    assert to_new == mine


def test_the_most_in_demand_come_first_and_what_is_hardly_asked_for_not_at_all() -> None:
    seen = record([100.0, 50.0, 1.0, 0.01], replicas=())
    assert names(list(expected(seen, "new"))) == [adapter(0), adapter(1), adapter(2)]
    assert list(expected(DemandRecord(1000.0), "new")) == []


def test_an_adapter_that_needs_every_replica_is_expected_by_every_replica() -> None:
    hot = record([1000.0, *[1.0] * 50])
    for number in range(20):
        assert next(expected(hot, f"new{number}")).ref == adapter(0)


def test_a_share_counts_the_replicas_that_run_and_not_the_replica_twice() -> None:
    seen = record([1.0] * 64, replicas=("new",))
    assert len(list(expected(seen, "new"))) == 64


def test_requests_count_half_after_a_while() -> None:
    memory = DemandMemory()
    for _ in range(3):
        memory.came(adapter(1), 0.0)
    memory.came(adapter(2), 2 * HALF_LIFE_S)
    assert [(d.ref, d.weight) for d in memory.most(2 * HALF_LIFE_S)] == [(adapter(2), 1.0), (adapter(1), 0.75)]
    memory.came(adapter(2), 0.0)  # a clock that was set back
    assert AdapterDemand(adapter(2), 2.0) in memory.most(0.0)


def test_only_the_most_in_demand_are_remembered() -> None:
    memory = DemandMemory(num_kept=4)
    for number in range(20):
        for _ in range(1 + (number < 2)):
            memory.came(adapter(number), float(number))
    kept = names(memory.most(20.0))
    assert len(kept) == 4
    assert kept[:2] == [adapter(1), adapter(0)]


def test_the_gateways_records_are_added_up_as_of_the_newest() -> None:
    old = DemandRecord(0.0, ("gone", "one"), (AdapterDemand(adapter(1), 8.0),))
    new = DemandRecord(HALF_LIFE_S, ("one", "two"), (AdapterDemand(adapter(2), 5.0), AdapterDemand(adapter(1), 2.0)))
    both = merged([old, new])
    assert (both.at, both.replicas) == (HALF_LIFE_S, ("one", "two"))
    assert [(d.ref, d.weight) for d in both.adapters] == [(adapter(1), 6.0), (adapter(2), 5.0)]
