"""A curve has a bounded number of points, evenly spread, whatever was trained and in however many parts it was read."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import cast

from jobs.events import Event
from serve_apps.console.runs import MOST_POINTS, Losses, curve_of


def step(number: int, loss: float) -> Event:
    return cast("Event", {"event": "step", "step": number, "loss": loss})


def held_out(number: int, loss: float, subject: str = "adapter") -> Event:
    return cast("Event", {"event": "eval", "step": number, "eval_loss": loss, "subject": subject})


def points(losses: Losses) -> list[list[float | None]]:
    curve = curve_of(losses.lines())
    assert curve is not None
    found: list[list[float | None]] = json.loads(curve.points)
    assert len(found) == len(json.loads(curve.labels))
    return found


def test_losses_are_thinned() -> None:
    losses = Losses()
    for begin in range(1, 50_001, 100):
        losses.take(step(n, 1.0 / n) for n in range(begin, begin + 100))
        losses.take(held_out(n, 2.5) for n in range(begin, begin + 100))
    steps, training, held = points(losses)
    assert 235 <= len(steps) == len(training) == len(held) <= MOST_POINTS
    assert (steps[0], steps[-1], training[0], held[0]) == (1, 50_000, 1.0, 2.5)
    gaps = [after - before for before, after in pairwise(steps[:-1])]
    assert len(set(gaps)) == 1


def test_few_losses_are_all_there() -> None:
    losses = Losses()
    assert curve_of(losses.lines()) is None
    losses.take([step(1, 1.0), step(2, 0.5), held_out(2, 0.25)])
    assert points(losses) == [[1, 2], [1.0, 0.5], [None, 0.25]]


def test_checkpoints_take_no_held_out_loss_away() -> None:
    """Their events repeat a loss, and come when the upload is done: here after two later evaluations."""
    losses = Losses()
    for n in range(1, 3001):
        losses.take([held_out(n, 1.0), held_out(n, 1.0 / n)])
        if n > 2:
            losses.take([cast("Event", {"event": "checkpoint", "step": n - 2, "eval_loss": 9.0})])
    steps, _, held = points(losses)
    assert 235 <= len(steps) <= MOST_POINTS
    assert held == [1.0 / n for n in steps]
    assert (steps[0], steps[-1]) == (1, 3000)
    assert len({after - before for before, after in pairwise(steps[:-1])}) == 1


def test_a_step_that_comes_again_replaces_what_followed() -> None:
    losses = Losses()
    losses.take(step(n, 1.0) for n in range(1, 10))
    losses.take(step(n, 0.5) for n in range(5, 8))  # from a checkpoint
    assert points(losses)[:2] == [[1, 2, 3, 4, 5, 6, 7], [1.0] * 4 + [0.5] * 3]


def test_each_model_that_is_measured_has_its_line() -> None:
    losses = Losses()
    losses.take([held_out(0, 3.0, "base"), held_out(0, 4.0, "base_scaled"), held_out(0, 9.0, "of a later version")])
    losses.take([step(1, 2.0), step(2, 1.0), held_out(2, 1.5)])
    curve = curve_of(losses.lines())
    assert curve is not None
    assert json.loads(curve.labels) == [
        "step",
        "training",
        "held out, adapter",
        "held out, base scaled",
        "held out, base",
    ]
    assert points(losses) == [[0, 1, 2], [None, 2.0, 1.0], [None, None, 1.5], [4.0, None, 4.0], [3.0, None, 3.0]]


def test_a_run_from_an_adapter_is_compared_with_its_parent() -> None:
    losses = Losses()
    losses.take([held_out(0, 3.0, "parent"), held_out(5, 2.0)])
    assert points(losses) == [[0, 5], [None, None], [None, 2.0], [3.0, 3.0]]


def test_all_lines_together_are_bounded() -> None:
    losses = Losses()
    for n in range(5000):
        losses.take([step(3 * n, 1.0), held_out(3 * n + 1, 1.0)])
        losses.take(held_out(3 * n + 2, 1.0, subject) for subject in ("parent", "base", "base_scaled"))
    assert len(points(losses)[0]) <= MOST_POINTS
