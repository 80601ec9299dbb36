"""A sweep's trials: their recipes, what became of them, and which is the best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from jobs.sweeps.axes import Values
from loray.errors import SpecError
from loray.recipes.fields import given
from loray.spec import Frozen, TrainSpec

PLAN = "plan.json"  # in a sweep's folder
TrialStatus = Literal["running", "completed", "stopped", "failed"]


class Trial(Frozen):
    """`values` are the fields that vary, as `--set` takes them; `recipe` is the whole of it."""

    values: dict[str, str]
    recipe: TrainSpec


class SweepPlan(Frozen):
    """All trials of a sweep, checked before the first one starts.

    recipe          without what varies
    folder          where relative data paths start
    max_concurrent  trials at once; None: as many as the cluster has place for
    stops_early     trials with a high held-out loss are stopped
    """

    recipe: TrainSpec
    folder: str
    trials: tuple[Trial, ...]
    max_concurrent: int | None = None
    stops_early: bool = True

    @property
    def name(self) -> str:
        return self.recipe.name


class TrialRecord(Frozen):
    """What became of a trial so far. `losses`: step and held-out loss of each evaluation. `message`: why it failed."""

    trial: int
    values: dict[str, str]
    status: TrialStatus = "running"
    num_steps: int | None = None
    losses: tuple[tuple[int, float], ...] = ()
    message: str = ""

    @property
    def has_ended(self) -> bool:
        return self.status != "running"

    @property
    def step(self) -> int:
        return self.losses[-1][0] if self.losses else 0

    def with_loss(self, step: int, loss: float, num_steps: int) -> TrialRecord:
        """A resumed trial measures again what it had measured after its last checkpoint."""
        kept = tuple(pair for pair in self.losses if pair[0] < step)
        return self.model_copy(update={"losses": (*kept, (step, loss)), "num_steps": num_steps})

    def loss(self, *, keep_best: bool) -> float | None:
        """Of the checkpoint that would be published; None where nothing was measured."""
        if not self.losses:
            return None
        return min(loss for _, loss in self.losses) if keep_best else self.losses[-1][1]


def expand(points: Sequence[Values], load: Callable[[dict[str, Any]], TrainSpec]) -> tuple[Trial, ...]:
    """The whole recipe of each point; `load` makes it from what lies on top of the sweep's. Raises SpecError."""
    trials = []
    for values in points:
        try:
            recipe = load(given([f"{path}={value}" for path, value in values.items()]))
        except SpecError as e:
            raise SpecError(f"trial {label(values)}: {e}") from e
        trials.append(Trial(values=dict(values), recipe=recipe))
    return tuple(trials)


def ranked(records: Sequence[TrialRecord], *, keep_best: bool) -> list[TrialRecord]:
    """Completed trials by their loss, then stopped ones, then the rest."""

    def key(record: TrialRecord) -> tuple[int, float, int]:
        loss = record.loss(keep_best=keep_best)
        order = ("completed", "stopped", "running", "failed").index(record.status)
        return order, float("inf") if loss is None else loss, record.trial

    return sorted(records, key=key)


def best(records: Sequence[TrialRecord], *, keep_best: bool) -> TrialRecord | None:
    """The completed trial with the lowest held-out loss."""
    for record in ranked(records, keep_best=keep_best)[:1]:
        if record.status == "completed" and record.losses:
            return record
    return None


def label(values: Values) -> str:
    """`{"adapter.rank": "8"}` → "rank=8"; whole paths where two fields have one name."""
    names = [path.rpartition(".")[2] for path in values]
    return " ".join(
        f"{name if names.count(name) == 1 else path}={value}"
        for name, (path, value) in zip(names, values.items(), strict=True)
    )


def record_file(trial: int) -> str:
    """The name of a trial's record in the sweep's folder."""
    return f"trial_{trial:04}.json"
