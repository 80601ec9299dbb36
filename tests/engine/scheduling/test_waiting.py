"""Requests that wait, for their turn or for a load: their places, their time, and a store that is stuck."""

from __future__ import annotations

from typing import Any

import pytest

from loray.engine.request import Request
from loray.errors import Overloaded, StoreError
from loray.spec import AdapterRef
from tests.fixtures.scheduling import Simulation, adapter

WARM = adapter("warm")


def world(**options: Any) -> Simulation:
    """WARM is in the pool; other loads end when the test says so. A step takes a second."""
    sim = Simulation(loads_at_once=False, step_s=1.0, **options)
    serve(sim, WARM)
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


def serve(sim: Simulation, *refs: AdapterRef | None) -> None:
    """Their requests end, and loads for them."""
    requests = [sim.add(adapter=ref) for ref in refs]
    sim.scheduler.next()
    for digest in {ref.digest for ref in refs if ref is not None} & {*sim.loading}:
        sim.finish(digest)
    sim.run(until=lambda: all(r in sim.outcomes for r in requests))
    assert [sim.outcomes.pop(r) for r in requests] == [None] * len(refs)


def check_late(sim: Simulation, *requests: Request) -> None:
    for request in requests:
        error = sim.outcomes.pop(request)
        assert isinstance(error, StoreError)
        assert "was not loaded within 30 s" in str(error)


def refused_for(sim: Simulation, ref: AdapterRef) -> float:
    """Seconds after which the store is tried again."""
    with pytest.raises(StoreError, match="it is tried again in") as refused:
        sim.add(adapter=ref)
    assert refused.value.retry_after_s is not None
    return refused.value.retry_after_s


def test_a_load_that_takes_too_long_fails_its_requests_alone() -> None:
    sim = world(load_timeout_s=30)
    first = sim.add(adapter=cold(1))
    idle(sim, 10)
    second = sim.add(adapter=cold(1))
    serve(sim, cold(2), WARM)
    assert first not in sim.outcomes
    idle(sim, 30)
    check_late(sim, first, second)
    assert not sim.scheduler.has_work
    sim.add(adapter=cold(3))  # the store is not stuck: another load has ended meanwhile


def test_a_store_that_is_stuck_is_tried_by_one_request_at_a_time() -> None:
    sim = world(load_timeout_s=30)
    for n, least in ((0, 0), (1, 2)):  # the time doubles
        trial = sim.add(adapter=cold(n))
        if n:
            refused_for(sim, cold(2))
        sim.scheduler.next()
        idle(sim, 30)
        check_late(sim, trial)
        assert least < refused_for(sim, cold(2)) <= 2 + least
        serve(sim, WARM, None)
        sim.now += 2 + least
    serve(sim, cold(2))
    serve(sim, cold(3), cold(4))


def test_a_request_that_left_or_was_served_is_not_late() -> None:
    sim = world(load_timeout_s=30)
    left = sim.add(adapter=cold(1))
    sim.scheduler.next()
    sim.remove(left)
    serve(sim, cold(2))
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
