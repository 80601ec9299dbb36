"""Long prompts beside short ones and beside streams, on a machine whose steps cost what a small CPU's do."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from loray.engine.request import Request
from tests.engine.scheduling.simulation import Simulation

LONG = 8000


def machine(itl_slo_s: float | None = 0.06, **options: Any) -> Simulation:
    """About 135 M parameters on two cores: a chunk of 512 tokens takes 0.3 s at the start of a prompt and 1.3 s after
    8,000 tokens.
    """
    sim = Simulation(
        num_blocks=8 * LONG,
        max_num_seqs=32,
        max_num_batched_tokens=512,
        step_s=0.013,
        token_s=0.0005,
        pair_s=0.26e-6,
        itl_slo_s=itl_slo_s,
        **options,
    )
    sim.check_integrity = lambda: None  # type: ignore[method-assign]
    return sim


def used(itl_slo_s: float | None = 0.06, **options: Any) -> Simulation:
    """A machine that has served a request before."""
    sim = machine(itl_slo_s, **options)
    sim.add(20, 10)
    sim.run()
    return sim


def worst_gap(sim: Simulation, request: Request) -> float:
    return max(b - a for a, b in pairwise(sim.token_times[request]))


@pytest.mark.parametrize("make", [machine, used])
def test_a_running_stream_hardly_notices_a_long_prompt(make: Any) -> None:
    sim = make()
    stream = sim.add(5, 2000, tenant="stream")
    sim.run(until=lambda: len(sim.token_times.get(stream, ())) > 5)
    long = sim.add(LONG, 4, tenant="long")
    sim.run(until=lambda: long in sim.outcomes)
    assert stream not in sim.outcomes
    assert worst_gap(sim, stream) <= 0.15
    by_tokens = used(None)
    stream = by_tokens.add(5, 2000, tenant="stream")
    by_tokens.run(until=lambda: stream in by_tokens.token_times)
    by_tokens.add(LONG, 4, tenant="long")
    by_tokens.run()
    assert worst_gap(by_tokens, stream) > 1


def experienced(**options: Any) -> Simulation:
    """A machine that knows what prompts without log-probabilities cost."""
    sim = machine(**options)
    sim.add(2000, 10)
    sim.run()
    return sim


SCORED = pytest.mark.parametrize("scored_s", [0.3e-3, 2e-3])  # logits of 49,152 tokens, and of a larger vocabulary


@SCORED
@pytest.mark.parametrize("make", [machine, used, experienced])
def test_a_stream_hardly_notices_log_probabilities_of_a_long_prompt(make: Any, scored_s: float) -> None:
    sim = make(scored_s=scored_s)
    stream = sim.add(5, 4000, tenant="stream")
    sim.run(until=lambda: len(sim.token_times.get(stream, ())) > 5)
    long = sim.add(LONG, 1, tenant="long", prompt_logprobs=20)
    sim.run(until=lambda: long in sim.outcomes)
    assert stream not in sim.outcomes
    assert worst_gap(sim, stream) <= 0.15


@SCORED
@pytest.mark.parametrize("max_num_batched_tokens", [512, 2 * LONG])
@pytest.mark.parametrize("make", [machine, used, experienced])
def test_who_comes_beside_log_probabilities_of_a_long_prompt_waits_for_a_short_step(
    make: Any, max_num_batched_tokens: int, scored_s: float
) -> None:
    sim = make(scored_s=scored_s)
    sim.scheduler._max_tokens = max_num_batched_tokens
    long, seconds = sim.add(LONG, 1, tenant="long", prompt_logprobs=20), []
    while long not in sim.outcomes:
        began = sim.now
        sim.step()
        seconds.append(sim.now - began)
    assert max(seconds) <= 0.25
    assert len(seconds) <= 1.2 * sum(seconds) / 0.24 + 8


@pytest.mark.parametrize("tenant", ["long", "other"])
@pytest.mark.parametrize("after", [0.1, 3.0, 9.0])
def test_a_short_prompt_behind_a_long_one_is_answered_at_once(tenant: str, after: float) -> None:
    sim = machine()
    long = sim.add(LONG, 4, tenant="long")
    sim.run(until=lambda: sim.now > after)
    asked_at, short = sim.now, sim.add(3, 20, tenant=tenant)
    sim.run(until=lambda: short in sim.outcomes)
    assert long not in sim.outcomes
    # After the step under way, which may have begun just before, comes its own.
    assert sim.first_token_at[short] - asked_at + 0.25 <= 0.4
    assert worst_gap(sim, short) <= 0.15
    sim.run()
    assert sim.outcomes == {short: None, long: None}


def test_a_long_prompt_alone_pays_little_for_shorter_steps() -> None:
    seconds = []
    for itl_slo_s in (None, 0.06):
        sim = used(itl_slo_s)
        began, long = sim.now, sim.add(LONG, 1)
        sim.run()
        seconds.append(sim.first_token_at[long] - began)
    assert seconds[1] <= 1.1 * seconds[0]


def test_a_long_prompt_ends_whatever_decodes_beside_it() -> None:
    """Thirty streams take more than a step's time by themselves."""
    sim = used(itl_slo_s=0.02)
    streams = [sim.add(5, 2000, tenant=f"t{i}") for i in range(30)]
    sim.run(until=lambda: all(s in sim.token_times for s in streams))
    began, long = sim.now, sim.add(1000, 4, tenant="long")
    sim.run(until=lambda: long in sim.outcomes)
    assert not sim.outcomes.keys() & set(streams)
    assert sim.now - began < 1000 / 16 * 0.06


def test_a_long_prompt_is_not_starved_by_shorter_ones_of_its_tenant() -> None:
    """Short prompts come faster than they can be served. The long one of n units is overtaken only by those that come
    before its tenant has received n units.
    """
    sim = used()
    shorts: list[Request] = []
    num_long = 2000
    long = sim.add(num_long, 1, tenant="t")
    counter = sim.scheduler.waiting.fair.counter
    came_at: dict[Request, float] = {}
    begun = counter("t")
    while long not in sim.outcomes:
        while sum(s not in sim.outcomes for s in shorts) < 4:
            shorts.append(sim.add(200, 1, tenant="t"))
            came_at[shorts[-1]] = counter("t") - begun
        sim.step()
    before = [s for s in shorts if s in sim.first_token_at and sim.first_token_at[s] < sim.first_token_at[long]]
    assert len(before) > 4
    assert max(came_at[s] for s in before) <= num_long
    assert counter("t") - begun <= 2 * num_long + 5 * (200 + 2) + 512


def test_many_prompts_advance_by_turns_of_their_tenants() -> None:
    sim = used()
    longs = [sim.add(3000, 1, tenant=f"t{i}") for i in range(4)]
    while not sim.first_token_at.keys() & set(longs):
        computed = [r.num_computed for r in longs]
        assert max(computed) - min(computed) <= 512
        sim.step()
    assert len(sim.scheduler.running) == 3


def test_a_burst_on_an_idle_engine_is_over_in_few_steps_and_disturbs_no_older_stream() -> None:
    def burst(sim: Simulation) -> list[float]:
        """Seconds of the steps until all have a token."""
        requests = [sim.add(64, 32, tenant=f"t{i}") for i in range(32)]
        seconds = []
        while not sim.first_token_at.keys() >= set(requests):
            began = sim.now
            sim.step()
            seconds.append(sim.now - began)
        return seconds

    warm = used()
    burst(warm)  # chunks grow step by step until larger ones have been measured
    warm.run()
    idle = burst(warm)
    assert len(idle) <= 5
    assert max(idle) <= 0.3
    busy = used()
    stream = busy.add(5, 2000, tenant="stream")
    busy.run(until=lambda: len(busy.token_times.get(stream, ())) > 250)
    assert len(burst(busy)) >= 12
    assert worst_gap(busy, stream) <= 0.15


def test_scored_prompts_are_as_long_a_step_as_others() -> None:
    """Log-probabilities of a prompt cost more than its tokens here."""
    sim = machine()
    seconds = sim.seconds
    sim.seconds = lambda work: seconds(work) + 0.001 * work.num_scored  # type: ignore[method-assign]
    stream = sim.add(5, 2000)
    sim.run(until=lambda: stream in sim.token_times)
    sim.add(2000, 1, tenant="plain")
    scored = sim.add(2000, 1, tenant="scored", prompt_logprobs=1)
    sim.run(until=lambda: scored in sim.outcomes)
    assert worst_gap(sim, stream) <= 0.15
