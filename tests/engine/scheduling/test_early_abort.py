"""Requests whose first token would come too late are refused."""

from __future__ import annotations

import math
from typing import Any

import pytest

from loray.errors import IntegrityError, Overloaded
from tests.fixtures.scheduling import Simulation, adapter


def measured(**options: Any) -> Simulation:
    """A simulation that has measured 0.1 s for a step, 0.01 s more for each token, and 10 tokens for a request."""
    sim = Simulation(step_s=0.1, token_s=0.01, enable_prefix_caching=False, **options)
    for i in range(8):
        sim.add(4 + 2 * i, 10)
    sim.run()
    sim.outcomes.clear()
    return sim


def test_a_request_whose_wait_is_too_long_is_refused_as_it_comes() -> None:
    sim = measured(max_num_seqs=2, max_num_batched_tokens=50)
    assert sim.add(40, 10, ttft_slo_s=0.6)  # alone: 0.1 + 40 · 0.01 = 0.5 s
    with pytest.raises(Overloaded, match=r"expected in 1\.0 s and was wanted within 0\.6") as refused:
        sim.add(40, 10, ttft_slo_s=0.6)
    assert refused.value.retry_after_s >= 1
    for _ in range(40):
        sim.add(40, 10)
    with pytest.raises(Overloaded) as refused:
        sim.add(40, 10, ttft_slo_s=5)
    estimate = float(str(refused.value).split(" in ")[1].split(" s")[0])
    assert refused.value.retry_after_s == pytest.approx(estimate - 5, abs=0.1)
    assert sim.scheduler.num_aborted == 2
    added_at, last = sim.now, sim.add(40, 10, ttft_slo_s=2 * estimate)
    sim.run()
    assert sim.outcomes[last] is None
    assert sim.first_token_at[last] - added_at == pytest.approx(estimate, rel=0.25)


def test_a_flood_is_not_held_against_another_tenant() -> None:
    sim = measured(max_num_seqs=2, max_num_batched_tokens=50)
    for _ in range(100):
        sim.add(10, 10, tenant="flood")
    with pytest.raises(Overloaded):
        sim.add(10, 10, tenant="flood", ttft_slo_s=20)
    asked_at, other = sim.now, sim.add(10, 10, tenant="other", ttft_slo_s=20)
    urgent = sim.add(10, 10, tenant="flood", priority=-1, ttft_slo_s=20)
    sim.run()
    assert sim.outcomes[other] is sim.outcomes[urgent] is None
    assert max(sim.first_token_at[other], sim.first_token_at[urgent]) - asked_at < 20


def test_a_waiting_request_is_refused_once_it_is_too_late_and_a_running_one_never() -> None:
    sim = Simulation(loads_at_once=False, max_num_seqs=1, step_s=1.0, ttft_slo_s=5.0)
    running = sim.add(4, 20)
    waiting = sim.add(4, 4)
    loading = sim.add(4, 4, adapter("never"))
    patient = sim.add(4, 4, ttft_slo_s=100.0)
    sim.run(until=lambda: sim.now >= 5)
    assert not sim.outcomes
    sim.step()
    sim.step()
    assert all(isinstance(sim.outcomes.pop(r), Overloaded) for r in (waiting, loading))
    assert sim.scheduler.num_aborted == 2
    sim.run()
    assert sim.outcomes == {running: None, patient: None}
    assert running.start_by == patient.start_by == math.inf


def test_a_long_prompt_is_too_late_before_its_time_is_up() -> None:
    sim = measured(max_num_seqs=1, max_num_batched_tokens=100)
    sim.add(1, 1000)
    sim.step()
    added_at, long = sim.now, sim.add(190, 4, tenant="other", ttft_slo_s=6.0)  # 2.1 s by itself
    sim.run(until=lambda: long in sim.outcomes)
    assert isinstance(sim.outcomes[long], Overloaded)
    assert 3.8 < sim.now - added_at < 4.3


def test_too_late_and_failed_in_the_same_step_is_refused_once() -> None:
    sim = Simulation(loads_at_once=False, step_s=1.0, ttft_slo_s=5.0)
    ref = adapter("x")
    request = sim.add(adapter=ref)
    sim.run(until=lambda: sim.now > 4)
    sim.finish(ref.digest, IntegrityError("damaged"))
    plan = sim.step()
    assert [r for r, _ in plan.failed] == [request]
    assert not sim.scheduler.has_work


def test_nobody_is_refused_before_anything_was_measured_or_without_a_target() -> None:
    sim = Simulation(max_num_seqs=1, step_s=10.0)
    for _ in range(50):
        sim.add(40, 4, ttft_slo_s=1e6)
        sim.add(40, 4)
    sim.run()
    assert set(sim.outcomes.values()) == {None}


def test_a_full_queue_says_when_it_will_have_drained() -> None:
    sim = measured(max_num_seqs=1, max_queued=8)
    for _ in range(8):
        sim.add(10, 10)
    with pytest.raises(Overloaded, match="8 requests are waiting already") as refused:
        sim.add(10, 10)
    asked_at, last = sim.now, list(sim.scheduler.waiting)[-1]
    sim.run()
    assert refused.value.retry_after_s == pytest.approx(sim.first_token_at[last] - asked_at, rel=0.4)
