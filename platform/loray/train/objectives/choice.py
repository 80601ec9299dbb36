"""Makes the objective that a recipe names."""

from __future__ import annotations

from typing import Any

from loray.spec import DpoSpec, TrainSpec
from loray.train.loss import Objective
from loray.train.objectives.preference import PreferenceObjective


def objective_of(model: Any, spec: TrainSpec) -> Objective:
    """What the recipe minimises."""
    return PreferenceObjective(model, spec.objective) if isinstance(spec.objective, DpoSpec) else Objective(model)
