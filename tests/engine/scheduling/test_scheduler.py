"""The scheduler with a real allocator and residency, and no model: order, blocks, priorities, random requests."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loray.engine.memory.adapter_manager import Tier
from loray.engine.memory.partial import PartialLoad
from loray.engine.request import RequestState
from loray.engine.scheduling.fairness import MAX_OVERTAKES
from loray.errors import IntegrityError
from tests.engine.scheduling.life import Life
from tests.engine.scheduling.simulation import Packed, Simulation, adapter


def test_one_tenant_is_served_in_order_of_priority_and_arrival() -> None:
    sim = Simulation(max_num_seqs=1)
    priorities = [0, 2, -1, 0, 2, -1]
    requests = [sim.add(priority=p) for p in priorities]
    sim.run()
    assert sim.started == [requests[i] for i in (2, 5, 0, 3, 1, 4)]


def test_preemption_takes_the_lowest_priority_and_of_these_the_youngest() -> None:
    sim = Simulation(num_blocks=4, enable_prefix_caching=False)
    sim.fill_up()
    requests = [sim.add(n, 14, priority=p) for n, p in ((1, 1), (1, 0), (2, 1), (2, 0))]
    sim.run(until=lambda: sim.scheduler.num_preemptions > 0)
    assert [r.state is RequestState.WAITING for r in requests] == [False, False, True, False]
    sim.run(until=lambda: sim.scheduler.num_preemptions > 1)
    assert [r.state is RequestState.WAITING for r in requests] == [True, False, True, False]
    sim.run()
    assert [len(r.output_ids) for r in requests] == [14] * 4
    assert list(sim.outcomes) == [requests[i] for i in (1, 3, 0, 2)]


def test_who_waits_for_an_adapter_blocks_nobody_and_who_waits_for_blocks_everybody() -> None:
    sim = Simulation(num_blocks=5, loads_at_once=False, enable_prefix_caching=False)
    ref = adapter("cold")
    cold = sim.add(adapter=ref, tenant="t")
    first = sim.add(8, 4, tenant="t")
    sim.step()
    large = sim.add(16, 4, tenant="t")
    small = sim.add(16, 4, tenant="t")
    sim.step()
    assert sim.scheduler.running == [first]  # `large` needs four blocks of the three that are left
    sim.finish(ref.digest)
    sim.run()
    assert sim.started == [first, large, small, cold]  # all of whose adapters, or none, are in the pool


def test_an_adapter_that_fails_fails_all_that_wait_for_it_and_at_once() -> None:
    ref = adapter("x")
    sim = Simulation(loads_at_once=False, max_num_seqs=1)
    busy = sim.add(4, 40)
    waiting = [sim.add(adapter=ref, tenant=t) for t in "ab"]
    sim.step()
    sim.finish(ref.digest, IntegrityError("damaged"))
    sim.step()  # while the batch is full
    assert set(sim.outcomes) == set(waiting)
    assert sim.scheduler.running == [busy]

    sim = Simulation(max_num_seqs=1)
    sim.damaged.add(ref.digest)
    waiting = [sim.add(adapter=ref, tenant=t) for t in "ab"]
    sim.step()
    sim.step()
    assert all(isinstance(sim.outcomes[r], IntegrityError) for r in waiting)
    assert not sim.scheduler.has_work


@pytest.mark.parametrize("late", [False, True])
def test_who_began_on_an_adapter_that_then_fails_has_had_no_service(late: bool) -> None:
    """While its request runs, or after the request was preempted because the adapter is late."""
    sim, ref, partial = Simulation(loads_at_once=False), adapter("x"), PartialLoad()
    request = sim.add(10, 4, ref, tenant="t")
    sim.scheduler.next()
    sim.loads[ref.digest].set_result(Packed(1, partial=partial))
    assert [c.request for c in sim.scheduler.next().chunks] == [request]
    assert sim.scheduler.waiting.fair.counter("t") == 10
    partial.late = late
    assert bool(sim.scheduler.next().chunks) is not late
    partial.fail(IntegrityError("damaged"))
    ((failed, error),) = sim.scheduler.next().failed
    assert failed is request
    assert isinstance(error, IntegrityError)
    assert sim.scheduler.waiting.fair.counter("t") == 0


def test_small_adapters_in_demand_do_not_keep_a_large_one_from_the_host() -> None:
    """Host and pool hold three small adapters or the large one; requests for each small one always wait."""
    sim = Simulation(num_blocks=7, host_bytes=6, max_num_seqs=2, enable_prefix_caching=False)
    small = [adapter(f"small {i}", 2) for i in range(4)]

    def keep_asking() -> None:
        for ref in small:
            while sum(r.adapter is ref for r in sim.scheduler.waiting) < 2:
                sim.add(4, 4, ref, tenant=ref.name)

    for _ in range(50):
        keep_asking()
        sim.step()
    large, num_started = sim.add(4, 4, adapter("large", 5), tenant="large"), len(sim.started)
    while large not in sim.outcomes:
        keep_asking()
        sim.step()
        assert len(sim.started) - num_started <= 40  # five for each that was waiting; it was never before
    assert sim.outcomes[large] is None


@pytest.mark.parametrize("outcome", [None, IntegrityError("damaged")], ids=["load", "fail"])
def test_many_adapters_at_once_cost_each_as_much_as_few(outcome: Exception | None) -> None:
    """The number of function calls in the step in which their loads end."""

    def num_calls(num_adapters: int) -> int:
        sim = Simulation(loads_at_once=False, max_num_seqs=1)
        for i in range(num_adapters):
            sim.add(adapter=adapter(f"x{i}"), tenant=f"t{i}")
        sim.scheduler.next()
        for digest in sim.loading:
            sim.finish(digest, outcome)
        calls = 0

        def count(frame: object, event: str, argument: object) -> None:
            nonlocal calls
            calls += event == "call"

        sys.setprofile(count)
        try:
            plan = sim.scheduler.next()
        finally:
            sys.setprofile(None)
        assert len(plan.failed) == (num_adapters if outcome else 0)
        return calls

    assert num_calls(400) < 5 * num_calls(100)


@pytest.mark.parametrize("tenants", [("t", "t"), ("hot", "cold")])
def test_resident_adapters_are_preferred_and_cold_ones_wait_for_no_more_than_the_stated_number(
    tenants: tuple[str, str],
) -> None:
    """The pool has room for one adapter beside a request: every change of adapter costs an eviction."""
    sim = Simulation(num_blocks=4, max_num_seqs=1, max_num_batched_tokens=1000)
    hot, cold = adapter("hot", 2), adapter("cold", 2)
    for ref in (cold, hot):
        sim.add(adapter=ref)
        sim.run()
    assert sim.adapter_manager.table.tier(hot) is Tier.POOL
    sim.started.clear()
    evictions = sim.adapter_manager.counts.num_evictions
    colds = [sim.add(4, 4, cold, tenant=tenants[1]) for _ in range(2)]
    for _ in range(18):
        sim.add(4, 4, hot, tenant=tenants[0])
    sim.run()
    assert colds[0].num_overtaken == MAX_OVERTAKES
    assert [sim.started.index(r) for r in colds] == [MAX_OVERTAKES, MAX_OVERTAKES + 1]  # the second is preferred then
    assert sim.adapter_manager.counts.num_evictions - evictions == 2


# -- random lives -----------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_random_lives_lose_nobody_and_leak_nothing(seed: int) -> None:
    life = Life(seed)
    life.live(40)
    life.end()
    life.check()


def test_a_long_life_in_a_small_pool() -> None:
    life = Life(2)
    life.sim.fill_up()
    life.live(10_000)
    life.end()
    life.check()
    assert life.sim.scheduler.num_preemptions > 400
    assert life.sim.adapter_manager.counts.num_failed_loads > 400
    assert life.sim.scheduler.num_aborted > 200
