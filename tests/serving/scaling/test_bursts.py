"""Replicas for the next burst: as many as do the work of the largest one while no other has started."""

from __future__ import annotations

import pytest

from loray.policy.autoscaling import Bursts, Decision, ScalingState, decide
from loray.spec import AutoscalingSpec
from tests.serving.scaling.made import observation

SPEC = AutoscalingSpec(max_replicas=40, startup_s=20, wait_slo_s=5.0, burst_factor=2.0, burst_memory_s=600.0)
NOW = 10_000.0
LONG_AGO = ScalingState(bursts=Bursts(since=NOW - 1000))


def decided(state: ScalingState = LONG_AGO, target: int = 10, now: float = NOW, **fields: float) -> Decision:
    """One report of `target`, in tokens of a replica's 1,000 a second."""
    return decide([observation(capacity=1000.0, **fields)], SPEC, state, target=target, now=now)


def test_replicas_do_the_work_of_a_burst_in_its_time_and_that_of_a_wait() -> None:
    """300 s of one replica's work within 20 s: twelve are done after 25 s."""
    decision = decided(tokens=60 * 4000.0, burst=300_000.0)
    assert decision[:2] == (12, "bursts")
    assert decision.reason.startswith(
        "bursts need 12 replicas (300000 tokens within the 20 s of a start, for which first tokens may wait 5.0 s); "
        "tokens need 5 replicas"
    )


def test_first_tokens_of_long_prompts_may_wait_as_long_as_a_prompt_takes() -> None:
    """Half of the prompts have 10 tokens, half 10,000, and a token is of one of the long ones: 10 s."""
    prompts = {"prompt_tokens": 100_100.0, "prompt_squares": 10 * (10.0**2 + 10_000.0**2)}
    assert decided(target=1, burst=290_000.0, **prompts).target == 10  # in 30 s
    assert decided(target=1, burst=290_000.0, prompt_tokens=100.0, prompt_squares=1000.0).target == 12


def test_the_largest_burst_is_remembered_for_a_time_and_then_the_number_falls() -> None:
    state, target = decided(burst=300_000.0).state, 12
    for second in range(2, 1000, 2):
        decision = decided(state, target, NOW + second, burst=20_000.0)
        state = decision.state
        if decision.target != target:
            break
    assert decision.target == 1
    assert 600 + SPEC.downscale_delay_s <= second <= 610 + SPEC.downscale_delay_s + 4


def test_a_new_load_is_expected_to_have_bursts_and_one_that_has_been_watched_has_those_seen() -> None:
    """Five replicas' work in the mean: bursts of twice that for 20 s need eight."""
    steady = {"tokens": 60 * 5000.0, "burst": 20 * 5000.0}
    new = decided(ScalingState(), 1, **steady)
    assert new[:2] == (8, "bursts")
    assert decided(new.state, 8, NOW + 599, **steady).cause == "bursts"
    watched = decided(new.state, 8, NOW + 601, **steady)
    assert watched.cause == "tokens"


def test_none_is_for_bursts_without_a_target_or_a_capacity() -> None:
    seen = observation(tokens=60 * 500.0, burst=1e9)
    assert decide([seen], SPEC, LONG_AGO, target=2, now=NOW).target == 2
    off = SPEC.model_copy(update={"wait_slo_s": None})
    decision = decide([observation(capacity=1000.0, burst=1e9)], off, ScalingState(), target=1, now=NOW)
    assert decision.target == 1
    assert decision.state.bursts == Bursts()


def test_a_burst_has_no_delay_and_other_loads_keep_theirs() -> None:
    """The working set needs more than the burst, and waits."""
    seen = observation(range(400), capacity=1000.0, burst=100_000.0)
    first = decide([seen], SPEC, LONG_AGO, target=1, now=NOW)
    assert first[:2] == (4, "bursts")
    assert "working set 400.0 MiB" in first.reason
    assert decide([seen], SPEC, first.state, target=4, now=NOW + SPEC.upscale_delay_s).target == 40


@pytest.mark.parametrize("memory_s", [10.0, 600.0])
def test_the_memory_is_exact_to_a_sixtieth_and_stays_small(memory_s: float) -> None:
    bursts, each = Bursts(), memory_s / 60
    seen: list[tuple[float, float]] = []
    for step in range(1000):
        now, tokens = step * each / 5, float((step * 7919) % 1009)
        bursts = bursts.noted(tokens, now, memory_s)
        seen.append((now, tokens))
        largest = bursts.largest(0.0, now, memory_s)
        assert largest >= max(t for at, t in seen if at > now - memory_s)
        assert largest <= max(t for at, t in seen if at > now - memory_s - each)
    assert len(bursts.marks) <= 61
    for step in range(1000):  # the worst case: each smaller than all before
        bursts = bursts.noted(1000.0 - step, now + step * each / 5, memory_s)
    assert len(bursts.marks) <= 61
