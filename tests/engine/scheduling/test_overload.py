"""The predicted duration of steps, and of the time to a first token."""

from __future__ import annotations

import pytest

from loray.engine.scheduling.overload import FirstTokenEstimate, StepSeconds


def test_fixed_and_per_token_costs_are_told_apart_and_the_past_is_forgotten() -> None:
    steps = StepSeconds()
    assert steps.predict(3, 300) == 0
    for scale in (1.0, 2.0):  # the machine becomes half as fast
        for i in range(2000):
            num_tokens = (1, 32, 500)[i % 3]
            steps.observe(num_tokens, scale * (0.02 + 0.001 * num_tokens))
        assert steps.predict(3, 300) == pytest.approx(scale * (3 * 0.02 + 300 * 0.001), rel=1e-3)


def test_a_single_stream_says_nothing_of_what_a_prompt_costs() -> None:
    steps = StepSeconds()
    for _ in range(100):
        steps.observe(1, 0.02)
    assert steps.predict(1, 500) == pytest.approx(0.02)  # at 50 tokens a second it would be ten seconds


def test_steps_that_grow_faster_than_their_tokens_never_cost_less_than_nothing() -> None:
    steps = StepSeconds()
    steps.observe(1, 0.0)
    steps.observe(100, 1.0)
    assert steps.predict(1, 1) > 0


def test_a_full_batch_lets_one_in_every_mean_output_over_its_size_steps() -> None:
    estimate = FirstTokenEstimate(max_num_seqs=4, max_num_batched_tokens=100)
    for num_tokens in (10, 100):
        estimate.observe_step(num_tokens, 1.0)
    for _ in range(3):
        estimate.observe_end(20)
    assert estimate.seconds(50, num_running=2, num_ahead=1) == 1  # there is a place
    assert estimate.seconds(1000) == 10  # chunks of its prompt
    assert estimate.seconds(50, num_running=4, num_ahead=3) == 4 * 20 / 4  # four must end first
