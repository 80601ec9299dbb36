"""A sweep: what varies, its trials, and their records."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any, Literal, NamedTuple

from pydantic import Field

from loray.errors import SpecError
from loray.recipes.fields import given
from loray.spec import Frozen, TrainSpec

PLAN = "plan.json"  # in a sweep's folder
MAX_TRIALS = 1000
# Held-out losses of trials can be compared only where base and held-out rows are the same.
_FIXED = ("name", "base", "data", "evaluation", "publish", "tracking")
_DIGITS = 4  # of a drawn number
_RANGES = ("uniform", "loguniform", "randint", "lograndint")

Values = Mapping[str, str]  # field → value, as `--set FIELD=VALUE` takes it
Draw = Callable[[random.Random], str]
TrialStatus = Literal["running", "completed", "stopped", "failed"]


class Axis(NamedTuple):
    """A field and its values, or what draws one."""

    path: str
    values: tuple[str, ...] = ()
    draw: Draw | None = None


def grid_axis(text: str) -> Axis:
    """Reads `adapter.rank=8,16`. Lists as values are in brackets: `adapter.target_modules=[q_proj],[q_proj,v_proj]`."""
    path, wanted = _split(text, "adapter.rank=8,16")
    values = _values(wanted)
    if len(set(values)) < len(values):
        raise SpecError(f"{text!r} names a value twice")
    return Axis(path, values)


def random_axis(text: str) -> Axis:
    """Reads `FIELD=loguniform(1e-5,1e-3)`, `uniform`, `randint`, `lograndint` as in Ray Tune, or values to draw."""
    path, wanted = _split(text, "optimizer.learning_rate=loguniform(1e-5,1e-3)")
    match = re.fullmatch(r"(\w+)\(([^,()]+),([^,()]+)\)", wanted)
    if match is None:
        if "(" in wanted:
            raise SpecError(f"{wanted!r} is no range; write one as {', '.join(f'{name}(1,10)' for name in _RANGES)}")
        choices = _values(wanted)
        return Axis(path, choices, lambda generator: generator.choice(choices))
    name, low, high = match.groups()
    if name not in _RANGES:
        raise SpecError(f"there is no range {name!r}; there are {', '.join(_RANGES)}")
    try:
        bounds = float(low), float(high)
    except ValueError as e:
        raise SpecError(f"{wanted!r} needs two numbers") from e
    is_log, is_whole = name.startswith("log"), name.endswith("randint")
    if not bounds[0] < bounds[1] or not all(map(math.isfinite, bounds)) or (is_log and bounds[0] <= 0):
        raise SpecError(f"{wanted!r}: the first number must be below the second" + (", and above 0" if is_log else ""))
    if is_whole and any(bound != int(bound) for bound in bounds):
        raise SpecError(f"{wanted!r} needs whole numbers")
    return Axis(path, draw=lambda generator: _drawn(name, generator, *bounds))


def points(grid: Sequence[Axis], ranges: Sequence[Axis], num_draws: int | None, *, seed: int) -> list[Values]:
    """Returns the values of each trial: every point of the grid, with `num_draws` draws of the ranges for each.

    The same arguments give the same trials; a point that is drawn twice is one trial. Raises SpecError where nothing
    varies, or what may not.
    """
    if not grid and not ranges:
        raise SpecError("nothing varies: give a grid (--grid FIELD=VALUE,VALUE), or ranges (--random N FIELD=RANGE)")
    if ranges and num_draws is None:
        raise SpecError(f"{ranges[0].path} has a range: say how many draws there are (--random N)")
    if num_draws is not None and not ranges:
        raise SpecError("there is nothing to draw from: give a range, as optimizer.learning_rate=loguniform(1e-5,1e-3)")
    paths = [axis.path for axis in (*grid, *ranges)]
    _check_paths(paths)
    count = math.prod(len(axis.values) for axis in grid) * (num_draws or 1)
    if count > MAX_TRIALS:
        raise SpecError(f"these are {count:,} trials, and {MAX_TRIALS:,} are the most: vary less")
    generator = random.Random(seed)
    found: dict[tuple[str, ...], None] = {}
    for fixed in product(*(axis.values for axis in grid)):
        for _ in range(num_draws or 1):
            found[(*fixed, *(axis.draw(generator) for axis in ranges if axis.draw is not None))] = None
    return [dict(zip(paths, point, strict=True)) for point in found]


def _check_paths(paths: Sequence[str]) -> None:
    for path in paths:
        if paths.count(path) > 1:
            raise SpecError(f"{path} varies twice: give it once")
        if path.partition(".")[0] in _FIXED:
            raise SpecError(
                f"{path} cannot vary: the trials of a sweep train one adapter's name on one base and one set of rows, "
                "so that their held-out losses can be compared"
            )


def _split(text: str, example: str) -> tuple[str, str]:
    path, separator, wanted = (part.strip() for part in text.partition("="))
    if not separator or not path or not wanted:
        raise SpecError(f"{text!r} is no field with values; write it as {example}")
    return path, wanted


def _values(text: str) -> tuple[str, ...]:
    """Splits at the commas that are in no brackets."""
    values = tuple(part.strip() for part in re.split(r",(?![^\[]*\])", text))
    if not all(values):
        raise SpecError(f"{text!r} has an empty value")
    return values


def _drawn(name: str, generator: random.Random, low: float, high: float) -> str:
    if name == "randint":  # without the upper bound
        return str(generator.randrange(int(low), int(high)))
    if name.startswith("log"):
        value = math.exp(generator.uniform(math.log(low), math.log(high)))
    else:
        value = generator.uniform(low, high)
    return str(min(int(high) - 1, int(value))) if name == "lograndint" else f"{value:.{_DIGITS}g}"


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
    """The state of a trial so far. `losses`: step and held-out loss of each evaluation. `message`: why it failed."""

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
        """Adds an evaluation. A resumed trial measures again what it had measured after its last checkpoint."""
        kept = tuple(pair for pair in self.losses if pair[0] < step)
        return self.model_copy(update={"losses": (*kept, (step, loss)), "num_steps": num_steps})

    def losses_from(self, part: float) -> list[float]:
        """Returns the losses that were measured when so much of the steps, from 0 to 1, was behind the trial."""
        return [loss for step, loss in self.losses if self.num_steps and step >= part * self.num_steps]

    def loss(self, *, keep_best: bool) -> float | None:
        """Returns that of the checkpoint that would be published; None where nothing was measured."""
        if not self.losses:
            return None
        return min(loss for _, loss in self.losses) if keep_best else self.losses[-1][1]


def expand(points: Sequence[Values], load: Callable[[dict[str, Any]], TrainSpec]) -> tuple[Trial, ...]:
    """Makes the whole recipe of each point; `load` makes it from what lies on top of the sweep's. Raises SpecError."""
    trials = []
    for values in points:
        try:
            recipe = load(given([f"{path}={value}" for path, value in values.items()]))
        except SpecError as e:
            raise SpecError(f"trial {label(values)}: {e}") from e
        trials.append(Trial(values=dict(values), recipe=recipe))
    return tuple(trials)


def ranked(records: Sequence[TrialRecord], *, keep_best: bool) -> list[TrialRecord]:
    """Sorts completed trials by their loss, then come stopped ones, then the rest."""

    def key(record: TrialRecord) -> tuple[int, float, int]:
        loss = record.loss(keep_best=keep_best)
        order = ("completed", "stopped", "running", "failed").index(record.status)
        return order, float("inf") if loss is None else loss, record.trial

    return sorted(records, key=key)


def best(records: Sequence[TrialRecord], *, keep_best: bool) -> TrialRecord | None:
    """Returns the completed trial with the lowest held-out loss."""
    for record in ranked(records, keep_best=keep_best)[:1]:
        if record.status == "completed" and record.losses:
            return record
    return None


def label(values: Values) -> str:
    """Writes `{"adapter.rank": "8"}` as "rank=8"; whole paths where two fields have one name."""
    names = [path.rpartition(".")[2] for path in values]
    return " ".join(
        f"{name if names.count(name) == 1 else path}={value}"
        for name, (path, value) in zip(names, values.items(), strict=True)
    )


def record_file(trial: int) -> str:
    """Returns the name of a trial's record in the sweep's folder."""
    return f"trial_{trial:04}.json"


class SweepSpec(Frozen):
    """A sweep as the options of `loray sweep` ask for it.

    grid            FIELD=VALUE,VALUE: each value of the field; of several fields each with each
    ranges          FIELD=RANGE to draw from, or FIELD=VALUE,VALUE to choose from
    num_draws       of the ranges, for each point of the grid
    draw_seed       another one draws other values
    max_concurrent  trials at once; None: as many as fit
    stops_early     trials with a high held-out loss are stopped (ASHA; needs evaluation.interval_steps)
    """

    grid: tuple[str, ...] = ()
    ranges: tuple[str, ...] = ()
    num_draws: int | None = Field(default=None, gt=0)
    draw_seed: int = Field(default=0, ge=0)
    max_concurrent: int | None = Field(default=None, gt=0)
    stops_early: bool = True

    def plan(self, recipe: TrainSpec, load: Callable[[dict[str, Any]], TrainSpec], *, folder: str) -> SweepPlan:
        """Makes all trials of `recipe`. `load` makes the recipe with values on top of it; relative data start at
        `folder`.

        Raises SpecError where nothing varies or what may not, for more trials than `MAX_TRIALS`, for one whose recipe
        is not valid, and for a recipe that holds nothing out.
        """
        grid, ranges = [grid_axis(text) for text in self.grid], [random_axis(text) for text in self.ranges]
        found = points(grid, ranges, self.num_draws, seed=self.draw_seed)
        if recipe.data.eval is None and not recipe.data.eval_fraction:
            raise SpecError("a sweep compares trials by their held-out loss: give data.eval, or a data.eval_fraction")
        return SweepPlan(
            recipe=recipe,
            folder=folder,
            trials=expand(found, load),
            max_concurrent=self.max_concurrent,
            stops_early=self.stops_early,
        )
