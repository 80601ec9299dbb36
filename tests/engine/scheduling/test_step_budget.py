"""What a step costs, how much of a prompt fits one, and long prompts beside short ones and streams."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loray.engine.request import Chunk, Request, StepWork
from loray.engine.scheduling.step_budget import ALONE, MIN_CHUNK, StepBudget, StepTimeModel
from loray.spec import GenerateRequest, SamplingParams
from tests.fixtures.scheduling import Simulation

TARGET, MAX_TOKENS = 0.1, 512
LARGEST = StepWork(1, 64, 1 << 20, 4096, 1 << 30, 4096)


def known(*costs: float) -> StepTimeModel:
    steps = StepTimeModel()
    steps.costs, steps.largest = StepWork(*costs), LARGEST
    return steps


def prompt(num_tokens: int) -> Request:
    return Request(GenerateRequest("r", (1,) * num_tokens, SamplingParams()), 0)


costs = st.tuples(
    st.floats(0, 0.05),
    st.floats(0, 1e-3),
    st.floats(0, 1e-6),
    st.floats(0, 2e-3),
    st.floats(0, 1e-6),
    st.floats(0, 1e-3),
)


@given(costs, st.integers(0, 10_000), st.integers(1, 2000), st.integers(0, 32), st.booleans())
def test_a_chunk_is_the_largest_that_its_time_allows(
    costs: tuple[float, ...], start: int, num_pending: int, num_decoding: int, scored: bool
) -> None:
    steps = known(*costs)
    budget = StepBudget(steps, max_tokens=MAX_TOKENS, itl_slo_s=TARGET)
    for i in range(num_decoding):
        assert budget.decode(100, 1, num_decoding - 1 - i) == 1
    decoding = budget.work
    n = budget.fit(start, num_pending, scored=scored)
    target = TARGET if num_decoding else ALONE * TARGET
    room = max(target - steps.predict(decoding), target / 4)
    most = min(num_pending, MAX_TOKENS - num_decoding)

    def cost(n: int) -> float:
        pairs = n * start + n * (n + 1) // 2
        return steps.predict(StepWork(0, 0, start + n, n, pairs, n if scored else 0))

    def expected(room: float) -> int:
        fits = max((m for m in range(1, most + 1) if cost(m) <= room), default=0)
        if fits == most:
            return most
        return fits - fits % MIN_CHUNK if fits >= MIN_CHUNK else min(most, MIN_CHUNK)

    assert n in {expected(room * (1 - 1e-6)), expected(room * (1 + 1e-6))}


def test_a_step_that_gives_a_token_keeps_to_the_target() -> None:
    budget = StepBudget(known(0, 0, 0, 1e-3, 0, 0), max_tokens=MAX_TOKENS, itl_slo_s=TARGET)
    assert budget.fit(0, 1000) == 400  # tokens in ALONE times the target
    short = prompt(3)
    budget.add(Chunk(short, 0, 3))
    assert budget.fit(0, 1000) == 96
    budget.add(Chunk(prompt(1000), 0, 96))
    assert budget.fit(0, 1000) == 0  # nobody is given less than MIN_CHUNK
    assert budget.work == StepWork(1, 0, 3 + 96, 3 + 96, 6 + 96 * 97 // 2)


def test_before_anything_is_measured_tokens_decide_and_then_chunks_grow_step_by_step() -> None:
    steps = StepTimeModel()
    assert StepBudget(steps, max_tokens=MAX_TOKENS, itl_slo_s=TARGET).fit(0, 1000) == MAX_TOKENS
    sizes = []
    for num_tokens in (3, 32, 64, 128):
        steps.observe(StepWork(1).plus(StepWork.of(0, num_tokens)), 0.01)
        budget = StepBudget(steps, max_tokens=MAX_TOKENS, itl_slo_s=TARGET)
        budget.decode(10, 1, 0)
        sizes.append(budget.fit(0, 1000))
    assert sizes == [16, 64, 128, 256]


def test_one_slow_step_does_not_keep_chunks_small() -> None:
    """What comes after it is short and alike, and does not show what more tokens would cost."""
    steps, sizes = StepTimeModel(), []
    steps.observe(StepWork(1).plus(StepWork.of(0, 64)), 40 * TARGET)  # adapters were loaded
    for _ in range(8):
        budget = StepBudget(steps, max_tokens=MAX_TOKENS, itl_slo_s=TARGET)
        budget.decode(10, 1, 0)
        sizes.append(n := budget.fit(64, 1000))
        budget.add(Chunk(prompt(1000), 64, n))
        steps.observe(budget.work, 0.01 + 0.0005 * n)
    assert sizes[0] == MIN_CHUNK
    assert 64 <= max(sizes) <= 0.09 / 0.0005


def test_somebody_who_decodes_has_beside_him_at_most_twice_what_was_measured() -> None:
    steps = known(0, 0, 0, 1e-6, 0, 0)
    steps.largest = StepWork(1, 1, 100, 32, 1000)
    for num_decoding, expected in ((0, MAX_TOKENS), (1, 64)):
        budget = StepBudget(steps, max_tokens=MAX_TOKENS, itl_slo_s=TARGET)
        for _ in range(num_decoding):
            budget.decode(10, 1, 0)
        assert budget.fit(0, 1000) == expected


def test_forced_tokens_are_computed_together_and_leave_the_others_theirs() -> None:
    budget = StepBudget(StepTimeModel(), max_tokens=20, itl_slo_s=TARGET)
    assert budget.decode(100, 40, num_others=2) == MIN_CHUNK
    assert budget.decode(100, 40, num_others=1) == 3
    assert budget.decode(100, 1, num_others=0) == 1
    assert budget.fit(0, 10) == 0


COSTS = StepWork(
    13e-3, 0.7e-3, 0.2e-6, 0.45e-3, 0.26e-6, 0.3e-3
)  # about those of a CPU and a model of 135 M parameters


def cost_of(work: StepWork, scale: float = 1.0) -> float:
    return scale * sum(c * q for c, q in zip(COSTS, work, strict=True))


def random_work(rng: random.Random, *, prompts: bool) -> StepWork:
    num_decoded = rng.randint(0, 32)
    work = StepWork(1, num_decoded, num_decoded * rng.randint(1, 3000))
    if prompts:
        work = work.plus(StepWork.of(rng.randint(0, 8000), rng.randint(2, 512), rng.choice([0, 0, 100])))
    return work


def observe_steps(
    steps: StepTimeModel, num_steps: int, *, scale: float = 1.0, noise: float = 0.0, prompts: bool = True
) -> None:
    rng = random.Random(num_steps)
    for i in range(num_steps):
        work = random_work(rng, prompts=prompts and i % 3 == 0)
        steps.observe(work, cost_of(work, scale) * rng.uniform(1 - noise, 1 + noise))


def check_costs(steps: StepTimeModel, *, scale: float = 1.0, rel: float) -> None:
    rng = random.Random(99)
    for _ in range(50):
        work = random_work(rng, prompts=True)
        assert steps.predict(work) == pytest.approx(cost_of(work, scale), rel=rel)


def test_costs_are_told_apart_and_the_past_is_forgotten() -> None:
    steps = StepTimeModel()
    assert steps.predict(StepWork.of(0, 100)) == 0
    assert not steps.is_known
    observe_steps(steps, 600, noise=0.1)
    check_costs(steps, rel=0.15)
    observe_steps(steps, 2000, scale=2.0, noise=0.1)
    check_costs(steps, scale=2.0, rel=0.15)


def test_decoding_does_not_wash_out_what_a_prompt_costs() -> None:
    steps = StepTimeModel()
    observe_steps(steps, 600)
    observe_steps(steps, 20_000, noise=0.1, prompts=False)
    check_costs(steps, rel=0.1)


def test_a_single_stream_says_nothing_of_what_a_prompt_costs() -> None:
    steps = StepTimeModel()
    for i in range(100):
        steps.observe(StepWork(1).plus(StepWork.of(i, 1)), 0.02)
    assert steps.predict(StepWork(1).plus(StepWork.of(0, 500))) == pytest.approx(
        0.02, rel=0.01
    )  # not 500 times as much


@pytest.mark.parametrize("noise", [0.0, 0.1])
def test_steps_that_all_last_equally_long_do_not_turn_their_tokens_into_a_fixed_cost(noise: float) -> None:
    """A long prompt in steps of one time: a fixed cost of that time alone would explain them as well."""
    steps = StepTimeModel()
    observe_steps(steps, 60)
    rng = random.Random(0)
    start = 0
    for _ in range(3000):
        n = max(2, int(0.25 / (COSTS.num_prompt + COSTS.num_pairs * start)))
        work = StepWork(1).plus(StepWork.of(start, n))
        steps.observe(work, cost_of(work) * rng.uniform(1 - noise, 1 + noise))
        start = (start + n) % 100_000
    assert steps.costs.num_steps < 0.05
    for n in (64, 256):
        work = StepWork(1).plus(StepWork.of(4000, n))
        assert steps.predict(work) == pytest.approx(cost_of(work), rel=0.3)


def test_exceptions_do_not_count_and_a_slow_start_is_soon_forgotten() -> None:
    steps = StepTimeModel()
    work = StepWork(1, 8, 800)
    steps.observe(work, 5.0)  # kernels were compiled
    for _ in range(12):
        steps.observe(work, 0.02)
    assert steps.predict(work) == pytest.approx(0.02, rel=0.2)
    for _ in range(4):
        steps.observe(work, 0.02)
    for _ in range(3):  # two at once, three times
        before = steps.costs
        steps.observe(work, 10.0)
        steps.observe(work, 10.0)
        assert steps.costs == before
        steps.observe(work, 0.02)


def test_steps_that_stay_slow_are_believed() -> None:
    steps = StepTimeModel()
    work = StepWork(1, 8, 800)
    for seconds, num in ((0.02, 40), (0.2, 60)):
        for _ in range(num):
            steps.observe(work, seconds)
    assert steps.predict(work) > 0.1


def test_no_cost_is_negative() -> None:
    steps = StepTimeModel()
    steps.observe(StepWork(1).plus(StepWork.of(0, 2)), 0.0)
    steps.observe(StepWork(1).plus(StepWork.of(0, 100)), 1.0)
    assert min(steps.costs) >= 0
    assert steps.predict(StepWork(1).plus(StepWork.of(0, 2))) > 0


LONG = 8000


def machine(itl_slo_s: float | None = 0.06, **options: Any) -> Simulation:
    """About 135 M parameters on two cores: a chunk of 512 tokens takes 0.3 s at the start of a prompt and 1.3 s after
    8,000 tokens.
    """
    return Simulation(
        checks=False,
        num_blocks=8 * LONG,
        max_num_seqs=32,
        max_num_batched_tokens=512,
        step_s=0.013,
        token_s=0.0005,
        pair_s=0.26e-6,
        itl_slo_s=itl_slo_s,
        **options,
    )


def used(itl_slo_s: float | None = 0.06, **options: Any) -> Simulation:
    """A machine that has served a request before."""
    sim = machine(itl_slo_s, **options)
    sim.add(20, 10)
    sim.run()
    return sim


def worst_gap(sim: Simulation, request: Request) -> float:
    return max(b - a for a, b in pairwise(sim.token_times[request]))


def experienced(**options: Any) -> Simulation:
    """A machine that knows what prompts without log-probabilities cost."""
    sim = machine(**options)
    sim.add(2000, 10)
    sim.run()
    return sim


def beside_a_long_prompt(sim: Simulation, **params: Any) -> float:
    """The worst gap of a stream."""
    stream = sim.add(5, 4000, tenant="stream")
    sim.run(until=lambda: len(sim.token_times.get(stream, ())) > 5)
    long = sim.add(LONG, 1, tenant="long", **params)
    sim.run(until=lambda: long in sim.outcomes)
    assert stream not in sim.outcomes
    return worst_gap(sim, stream)


SCORED = [0.3e-3, 2e-3]  # seconds for the logits of 49,152 tokens, and of a larger vocabulary


@pytest.mark.parametrize("scored_s", [0.0, *SCORED])
@pytest.mark.parametrize("make", [machine, used, experienced])
def test_a_running_stream_hardly_notices_a_long_prompt(make: Any, scored_s: float) -> None:
    assert beside_a_long_prompt(make(scored_s=scored_s), prompt_logprobs=20 if scored_s else None) <= 0.15


def test_without_a_target_a_stream_stands_still_beside_a_long_prompt() -> None:
    assert beside_a_long_prompt(used(None)) > 1


@pytest.mark.parametrize("scored_s", SCORED)
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
