"""Runs beside each other: their losses as one curve, their last figures, and the fields in which recipes differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from jobs.sweeps.history import Trials
from jobs.sweeps.trials import TrialRecord, best, label, ranked
from loray.catalog import Job
from loray.spec import TrainSpec
from serve_apps.console.live.histories import Seen
from serve_apps.console.live.losses import HELD_OUT, TRAINING
from serve_apps.console.live.progress import Step
from serve_apps.console.live.series import Curve, Line, curve_of

T = TypeVar("T")
_DRAWN_TRIALS = 5  # lines that can be told apart
_SHOWN_TRIALS = 50


class Row(NamedTuple):
    """A job among others. `step`: its last one; None before the first. `held_out`: the lowest loss of its adapter."""

    job: Job
    step: Step | None
    training: float | None
    held_out: float | None


class Difference(NamedTuple):
    """A field of the recipe, and what each job has there; empty where it has none."""

    path: str
    values: tuple[str, ...]


class Comparison(NamedTuple):
    rows: tuple[Row, ...]
    training: Curve | None
    held_out: Curve | None
    differences: tuple[Difference, ...]


class Ranked(NamedTuple):
    """A sweep's trials by their held-out loss: (trial, its values, its loss), the best first, and the first as a curve.
    `best`: the number of the one that is, or would be, published; None while records are still to be read.
    `num_trials`: of all.
    """

    rows: tuple[tuple[TrialRecord, str, float | None], ...]
    curve: Curve | None
    best: int | None
    num_trials: int


def rank(trials: Trials) -> Ranked:
    order = ranked(trials.records, keep_best=trials.keep_best)
    chosen = best(trials.records, keep_best=trials.keep_best) if trials.is_whole else None
    lines = {f"{record.trial}: {label(record.values)}": dict(record.losses) for record in order[:_DRAWN_TRIALS]}
    rows = ((r, label(r.values), r.loss(keep_best=trials.keep_best)) for r in order[:_SHOWN_TRIALS])
    return Ranked(tuple(rows), curve_of(lines), None if chosen is None else chosen.trial, len(order))


def compare(seen: Mapping[str, tuple[Job, Seen]]) -> Comparison:
    """By the jobs' ids, in their order."""
    training = {id: found.lines.get(TRAINING, {}) for id, (_, found) in seen.items()}
    held_out = {id: found.lines.get(HELD_OUT, {}) for id, (_, found) in seen.items()}
    rows = (
        Row(
            job,
            found.steps[-1] if found.steps else None,
            last_of(training[id]),
            min(held_out[id].values(), default=None),
        )
        for id, (job, found) in seen.items()
    )
    differences = differences_of([job.recipe for job, _ in seen.values()])
    return Comparison(tuple(rows), curve_of(training), curve_of(held_out), differences)


def differences_of(recipes: Sequence[TrainSpec]) -> tuple[Difference, ...]:
    """The fields, by their paths, that not all of them have alike."""
    flat = [_flat(recipe.model_dump(mode="json")) for recipe in recipes]
    paths = dict.fromkeys(path for fields in flat for path in fields)
    found = (Difference(path, tuple(fields.get(path, "") for fields in flat)) for path in paths)
    return tuple(difference for difference in found if len(set(difference.values)) > 1)


def loss_rows(lines: Mapping[str, Line], most: int) -> list[tuple[int, list[float | None]]]:
    """Steps with the loss of each line there, the last one first: half of them of held-out losses, where there are."""
    if not lines:
        return []
    every, measured = sorted(set().union(*lines.values())), sorted(lines[HELD_OUT])
    half = most // 2
    chosen = sorted({*spread(measured, half), *spread(every, most - half)}, reverse=True)
    return [(step, [line.get(step) for line in lines.values()]) for step in chosen]


def last_of(line: Line) -> float | None:
    return line[max(line)] if line else None


def spread(values: Sequence[T], most: int) -> list[T]:
    """At most so many, evenly spread; the last is among them."""
    stride = -(-len(values) // most) or 1
    return list(values[::-1][::stride][::-1])


def _flat(value: Any, path: str = "") -> dict[str, str]:
    if isinstance(value, dict):
        return {p: text for name, inner in value.items() for p, text in _flat(inner, f"{path}.{name}").items()}
    return {} if value is None else {path.removeprefix("."): str(value)}
