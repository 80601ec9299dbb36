"""The predicted time to a first token."""

from __future__ import annotations

from loray.engine.request import StepWork
from loray.engine.scheduling.early_abort import Backlog, TtftEstimate
from loray.engine.scheduling.step_budget import StepTimeModel


def test_a_full_batch_lets_one_in_every_mean_output_over_its_size_steps() -> None:
    steps = StepTimeModel()
    estimate = TtftEstimate(steps, max_num_seqs=4, max_num_batched_tokens=100)
    assert estimate.seconds(Backlog(1, 1000, 3.0), StepWork(1), num_running=4, mean_output=20) == 3
    for _ in range(50):
        steps.observe(StepWork(1, 1, 0), 1.0)
    assert estimate.seconds(Backlog(2, 50), StepWork(1), num_running=2, mean_output=20) == 1  # there is a place
    assert estimate.seconds(Backlog(1, 1000), StepWork(1)) == 10  # chunks of its prompt
    assert (
        estimate.seconds(Backlog(4, 50), StepWork(1), num_running=4, mean_output=20) == 4 * 20 / 4
    )  # four must end first
