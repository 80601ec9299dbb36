"""A curve has a bounded number of points, evenly spread, whatever was trained and in however many parts it was read."""

from __future__ import annotations

import json
from itertools import pairwise

from serve_apps.console.live.losses import MOST_POINTS, Losses


def step(number: int, loss: float) -> str:
    return json.dumps({"event": "step", "step": number, "loss": loss})


def held_out(number: int, loss: float) -> str:
    return json.dumps({"event": "eval", "step": number, "eval_loss": loss})


def test_losses_are_thinned() -> None:
    losses = Losses()
    for begin in range(1, 50_001, 100):
        losses.take(step(n, 1.0 / n) for n in range(begin, begin + 100))
        losses.take(held_out(n, 2.5) for n in range(begin, begin + 100))
    losses.take(["not an event"])
    steps, training, held = json.loads(losses.as_json())
    assert 250 <= len(steps) == len(training) == len(held) <= MOST_POINTS
    assert (steps[0], steps[-1], training[0], held[0]) == (1, 50_000, 1.0, 2.5)
    gaps = [after - before for before, after in pairwise(steps[:-1])]
    assert len(set(gaps)) == 1


def test_few_losses_are_all_there() -> None:
    losses = Losses()
    assert losses.as_json() == ""
    losses.take([step(1, 1.0), step(2, 0.5), held_out(2, 0.25)])
    assert json.loads(losses.as_json()) == [[1, 2], [1.0, 0.5], [None, 0.25]]


def test_checkpoints_take_no_held_out_loss_away() -> None:
    """Their events repeat a loss, and come when the upload is done: here after two later evaluations."""
    losses = Losses()
    for n in range(1, 3001):
        losses.take([held_out(n, 1.0), held_out(n, 1.0 / n)])
        if n > 2:
            losses.take([json.dumps({"event": "checkpoint", "step": n - 2, "eval_loss": 9.0})])
    steps, _, held = json.loads(losses.as_json())
    assert 250 <= len(steps) <= MOST_POINTS
    assert held == [1.0 / n for n in steps]
    assert (steps[0], steps[-1]) == (1, 3000)
    assert len({after - before for before, after in pairwise(steps[:-1])}) == 1


def test_a_step_that_comes_again_replaces_what_followed() -> None:
    losses = Losses()
    losses.take(step(n, 1.0) for n in range(1, 10))
    losses.take(step(n, 0.5) for n in range(5, 8))  # from a checkpoint
    assert json.loads(losses.as_json())[:2] == [[1, 2, 3, 4, 5, 6, 7], [1.0] * 4 + [0.5] * 3]
