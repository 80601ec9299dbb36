"""Sweeps on pages: the fields of a search below those of a recipe, the trials of a form, and what they take."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple, get_origin

from jobs.sweeps.spec import SweepPlan, SweepSpec, Trial, label
from loray.catalog import Catalog
from loray.planning.run import RunShape
from loray.recipes.fields import merge
from loray.settings import Settings
from loray.spec import TrainSpec
from serve_apps.console.recipes import (
    RunEstimate,
    Workers,
    estimate,
    fields_given,
    planned_run,
    recipe_from,
    workers_of,
)
from serve_apps.console.rendering import Form

_OF_SEARCH = "search."
_MOST_TRIALS = 200  # each of a form's is made anew whenever a field changes
_MOST_PLANS = 32


class SearchField(NamedTuple):
    """A field of `SweepSpec`. `name`: in the form. `kind`: several values are one a line."""

    name: str
    kind: Literal["lines", "choice", "number"]
    why: str
    default: str


class Kind(NamedTuple):
    """Trials that take as much of a worker: the values of the first, and how many there are."""

    values: str
    num_trials: int
    estimate: RunEstimate


class SweepEstimate(NamedTuple):
    """`kinds`: those of the largest trials, the one that takes most memory first. `num_kinds`: of all."""

    plan: SweepPlan
    kinds: tuple[Kind, ...]
    num_kinds: int


def search_fields() -> list[SearchField]:
    shown = []
    for name, field in SweepSpec.model_fields.items():
        kind: Literal["lines", "choice", "number"] = "number"
        if get_origin(field.annotation) is tuple:
            kind = "lines"
        elif field.annotation is bool:
            kind = "choice"
        shown.append(SearchField(_OF_SEARCH + name, kind, field.description or "", _text(field.default)))
    return shown


def sweep_of(form: Form, home: Path) -> SweepPlan | None:
    """The sweep of a form; None where its search is as it was at first. Raises SpecError."""
    asked: dict[str, Any] = {}
    for name, kind, _, default in search_fields():
        if (text := form.get(name)) and text != default:
            lines = [line.strip() for line in text.splitlines() if line.strip()]
            asked[name.removeprefix(_OF_SEARCH)] = lines if kind == "lines" else text
    if not asked:
        return None
    fields = fields_given(form)
    recipe = recipe_from(merge({}, fields), home)

    def load(values: dict[str, Any]) -> TrainSpec:
        return recipe_from(merge(merge({}, fields), values), home)

    return SweepSpec.parse(asked, source="the search").plan(recipe, load, folder="/", most=_MOST_TRIALS)


def estimate_of(plan: SweepPlan, catalog: Catalog, settings: Settings) -> SweepEstimate:
    """What `plan_of` says of the trials. Trials that take the same are planned once, and of many kinds those with the
    most tokens and trained parameters. Raises as `plan_of` does.
    """
    kinds: list[tuple[RunShape, Workers, list[Trial]]] = []
    for trial in plan.trials:
        workers = workers_of(trial.recipe, settings)
        run = planned_run(trial.recipe, workers, catalog, settings)
        same = next((trials for known, on, trials in kinds if (known, on) == (run, workers)), None)
        if same is None:
            kinds.append((run, workers, [trial]))
        else:
            same.append(trial)
    kinds.sort(key=lambda kind: (kind[0].tokens_per_worker, kind[0].trained.total), reverse=True)
    planned = [
        Kind(label(trials[0].values), len(trials), estimate(run, workers))
        for run, workers, trials in kinds[:_MOST_PLANS]
    ]
    planned.sort(key=lambda kind: kind.estimate.plan.memory.peak_bytes, reverse=True)
    return SweepEstimate(plan, tuple(planned), len(kinds))


def _text(default: object) -> str:
    """As a form has it: empty where there is none."""
    if isinstance(default, bool):
        return str(default).lower()
    return "" if default is None or default == () else str(default)
