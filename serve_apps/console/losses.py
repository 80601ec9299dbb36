"""The losses in a run's events, as a picture needs them."""

from __future__ import annotations

import json
from collections.abc import Iterable

from jobs.events.messages import decode

_MOST_POINTS = 1000


def losses_of(lines: Iterable[str]) -> str:
    """JSON of [steps, losses, held-out losses]; the training's evenly thinned to `_MOST_POINTS`. Empty without any."""
    training: dict[int, float] = {}
    held_out: dict[int, float] = {}
    for line in lines:
        event = decode(line)
        if event is None or not isinstance(step := event.get("step"), int):
            continue
        if isinstance(loss := event.get("loss"), float):
            training[step] = loss
        if isinstance(loss := event.get("eval_loss"), float):
            held_out[step] = loss
    steps = sorted(training.keys() | held_out.keys())
    if not steps:
        return ""
    held_out = {step: held_out[step] for step in _thinned(sorted(held_out))}
    shown = sorted(set(_thinned(steps)) | held_out.keys())
    return json.dumps([shown, [training.get(step) for step in shown], [held_out.get(step) for step in shown]])


def _thinned(steps: list[int]) -> list[int]:
    return steps[:: 1 + len(steps) // _MOST_POINTS]
