"""The steps of a run that a page shows: few, evenly spread, with the last one's figures."""

from __future__ import annotations

from typing import cast

from jobs.events import Event
from serve_apps.console.runs import MOST_STEPS, RunProgress


def test_few_steps_of_many_and_the_last() -> None:
    progress = RunProgress()
    assert progress.steps() == ()
    for n in range(1, 10_001):
        figures = {"num_steps": 10_000, "loss": 1.0 / n, "lr": 1e-3, "tokens_per_s": 512.0, "eta_s": 10_000.0 - n}
        progress.take([cast("Event", {"event": "step", "step": n} | figures)])
    steps = progress.steps()
    assert MOST_STEPS / 2 <= len(steps) <= MOST_STEPS
    last = steps[-1]
    assert (last.step, last.num_steps, last.tokens_per_s, last.eta_s) == (10_000, 10_000, 512.0, 0.0)
    assert (last.mfu, last.memory_bytes) == (None, None)  # an event need not have them


def test_what_is_no_figure_is_none() -> None:
    progress = RunProgress()
    odd = {"event": "step", "step": 3, "num_steps": "many", "loss": None, "lr": "fast", "memory_bytes": 1 << 30}
    progress.take([cast("Event", odd), cast("Event", {"event": "eval", "step": 4, "eval_loss": 1.0})])
    (only,) = progress.steps()
    assert (only.step, only.num_steps, only.loss, only.lr, only.memory_bytes) == (3, None, None, None, 1 << 30)
