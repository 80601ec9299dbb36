"""Requests that wait, for their turn or for a load: their places, their time, and a store that is stuck."""

from __future__ import annotations

from typing import Any

import pytest

from loray.errors import Overloaded, StoreError
from loray.spec import AdapterRef
from tests.fixtures.simulation import Simulation, adapter

WARM = adapter("warm")


def world(**options: Any) -> Simulation:
    """WARM is in the pool; other loads end when the test says so. A step takes a second."""
    sim = Simulation(loads_at_once=False, step_s=1.0, **options)
    request = sim.add(adapter=WARM)
    sim.step()
    sim.finish(WARM.digest)
    sim.run()
    assert sim.outcomes.pop(request) is None
    return sim


def idle(sim: Simulation, seconds: float) -> None:
    """Nothing runs meanwhile."""
    end = sim.now + seconds
    while sim.scheduler.has_work and sim.scheduler.next_deadline() <= end:
        sim.now = max(sim.now, sim.scheduler.next_deadline())
        sim.step()
    sim.now = max(sim.now, end)


def cold(name: int) -> AdapterRef:
    return adapter(f"cold-{name}")


def test_requests_that_wait_for_a_load_have_places_of_their_own() -> None:
    sim = world(max_queued=2, max_loading=3, max_num_seqs=1)
    waiting = [sim.add(adapter=cold(i)) for i in range(3)]
    with pytest.raises(Overloaded, match="3 requests wait for their adapters already") as refused:
        sim.add(adapter=cold(3))
    assert refused.value.retry_after_s >= 1
    others = [sim.add(adapter=WARM), sim.add()]
    with pytest.raises(Overloaded, match="2 requests are waiting already"):
        sim.add()
    sim.run(until=lambda: all(r in sim.outcomes for r in others))
    assert set(sim.outcomes.values()) == {None}
    assert not any(r in sim.outcomes for r in waiting)


def test_a_load_that_takes_too_long_fails_its_requests_alone() -> None:
    sim = world(load_timeout_s=30)
    first = sim.add(adapter=cold(1))
    idle(sim, 10)
    second, other = sim.add(adapter=cold(1)), sim.add(adapter=cold(2))
    sim.scheduler.next()
    sim.finish(cold(2).digest)
    sim.run(until=lambda: other in sim.outcomes)
    warm = sim.add(adapter=WARM)
    sim.run(until=lambda: warm in sim.outcomes)
    assert sim.outcomes[warm] is sim.outcomes[other] is None
    assert first not in sim.outcomes
    idle(sim, 30)
    for request in (first, second):
        error = sim.outcomes[request]
        assert isinstance(error, StoreError)
        assert "was not loaded within 30 s" in str(error)
    assert not sim.scheduler.has_work
    sim.add(adapter=cold(3))  # the store is not stuck: another load has ended meanwhile


def test_a_store_that_is_stuck_is_tried_by_one_request_at_a_time() -> None:
    sim = world(load_timeout_s=30)
    first = sim.add(adapter=cold(0))
    sim.scheduler.next()
    idle(sim, 30)
    assert isinstance(sim.outcomes.pop(first), StoreError)
    with pytest.raises(StoreError, match="it is tried again in") as refused:
        sim.add(adapter=cold(1))
    assert refused.value.retry_after_s is not None
    assert 0 < refused.value.retry_after_s <= 2
    warm, base = sim.add(adapter=WARM), sim.add()
    sim.run(until=lambda: warm in sim.outcomes and base in sim.outcomes)
    assert sim.outcomes[warm] is sim.outcomes[base] is None
    sim.now += 2
    trial = sim.add(adapter=cold(1))
    with pytest.raises(StoreError):
        sim.add(adapter=cold(2))
    sim.scheduler.next()
    idle(sim, 30)
    assert isinstance(sim.outcomes.pop(trial), StoreError)
    with pytest.raises(StoreError) as refused:
        sim.add(adapter=cold(2))
    assert refused.value.retry_after_s is not None
    assert 2 < refused.value.retry_after_s <= 4  # the time doubles
    sim.now += 4
    trial = sim.add(adapter=cold(2))
    sim.scheduler.next()
    sim.finish(cold(2).digest)
    sim.run(until=lambda: trial in sim.outcomes)
    assert sim.outcomes[trial] is None
    after = [sim.add(adapter=cold(n)) for n in (3, 4)]
    sim.scheduler.next()
    for n in (3, 4):
        sim.finish(cold(n).digest)
    sim.run(until=lambda: all(r in sim.outcomes for r in after))
    assert [sim.outcomes[r] for r in after] == [None, None]


def test_a_request_that_left_or_was_served_is_not_late() -> None:
    sim = world(load_timeout_s=30)
    left, served = sim.add(adapter=cold(1)), sim.add(adapter=cold(2))
    sim.scheduler.next()
    sim.remove(left)
    sim.finish(cold(2).digest)
    sim.run()
    assert sim.outcomes[served] is None
    assert sim.scheduler.next_deadline() > 1e9


def test_a_flood_fills_the_queue_for_itself_alone() -> None:
    sim = Simulation(max_num_seqs=1, max_queued=4)
    loud = [sim.add(tenant="loud")]
    sim.step()
    loud += [sim.add(tenant="loud") for _ in range(4)]
    with pytest.raises(Overloaded, match="4 requests are waiting already"):
        sim.add(tenant="loud")
    others = [sim.add(tenant="other") for _ in range(2)]
    with pytest.raises(Overloaded):
        sim.add(tenant="other")  # both have two
    sim.remove(loud[4])  # one that has given way leaves
    sim.run()
    assert [r for r in loud if isinstance(sim.outcomes[r], Overloaded)] == [loud[3]]
    assert all(sim.outcomes[r] is None for r in others)
