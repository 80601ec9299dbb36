"""The fit of a step's time: it finds the costs, forgets, and does not follow exceptions or what it cannot know."""

from __future__ import annotations

import random

import pytest

from loray.engine.request import StepWork
from loray.engine.scheduling.step_budget import StepTimeModel

COSTS = StepWork(
    13e-3, 0.7e-3, 0.2e-6, 0.45e-3, 0.26e-6, 0.3e-3
)  # about those of a CPU and a model of 135 M parameters


def seconds(work: StepWork, scale: float = 1.0) -> float:
    return scale * sum(c * q for c, q in zip(COSTS, work, strict=True))


def random_work(rng: random.Random, *, prompts: bool) -> StepWork:
    num_decoded = rng.randint(0, 32)
    work = StepWork(1, num_decoded, num_decoded * rng.randint(1, 3000))
    if prompts:
        work = work.plus(StepWork.of(rng.randint(0, 8000), rng.randint(2, 512), rng.choice([0, 0, 100])))
    return work


def measured(
    steps: StepTimeModel, num_steps: int, *, scale: float = 1.0, noise: float = 0.0, prompts: bool = True
) -> None:
    rng = random.Random(num_steps)
    for i in range(num_steps):
        work = random_work(rng, prompts=prompts and i % 3 == 0)
        steps.observe(work, seconds(work, scale) * rng.uniform(1 - noise, 1 + noise))


def check(steps: StepTimeModel, *, scale: float = 1.0, rel: float) -> None:
    rng = random.Random(99)
    for _ in range(50):
        work = random_work(rng, prompts=True)
        assert steps.predict(work) == pytest.approx(seconds(work, scale), rel=rel)


def test_costs_are_told_apart_and_the_past_is_forgotten() -> None:
    steps = StepTimeModel()
    assert steps.predict(StepWork.of(0, 100)) == 0
    assert not steps.is_known
    measured(steps, 600, noise=0.1)
    check(steps, rel=0.15)
    measured(steps, 2000, scale=2.0, noise=0.1)
    check(steps, scale=2.0, rel=0.15)


def test_decoding_does_not_wash_out_what_a_prompt_costs() -> None:
    steps = StepTimeModel()
    measured(steps, 600)
    measured(steps, 20_000, noise=0.1, prompts=False)
    check(steps, rel=0.1)


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
    measured(steps, 60)
    rng = random.Random(0)
    start = 0
    for _ in range(3000):
        n = max(2, int(0.25 / (COSTS.num_prompt + COSTS.num_pairs * start)))
        work = StepWork(1).plus(StepWork.of(start, n))
        steps.observe(work, seconds(work) * rng.uniform(1 - noise, 1 + noise))
        start = (start + n) % 100_000
    assert steps.costs.num_steps < 0.05
    for n in (64, 256):
        work = StepWork(1).plus(StepWork.of(4000, n))
        assert steps.predict(work) == pytest.approx(seconds(work), rel=0.3)


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
