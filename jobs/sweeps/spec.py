"""What is asked of a sweep: what varies, how many draws, which trials run at once and which are stopped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pydantic import Field

from jobs.sweeps.axes import MAX_TRIALS, grid_axis, points, random_axis
from jobs.sweeps.trials import SweepPlan, expand
from loray.errors import SpecError
from loray.spec import Frozen, TrainSpec


class SweepSpec(Frozen):
    """`loray sweep` makes it from its options, and the console's form has a field for each of these."""

    grid: tuple[str, ...] = Field(
        default=(), description="FIELD=VALUE,VALUE: each value of the field; of several fields each with each"
    )
    ranges: tuple[str, ...] = Field(
        default=(),
        description="FIELD=RANGE to draw from: loguniform(1e-5,1e-3), uniform, randint, lograndint, or values",
    )
    num_draws: int | None = Field(default=None, gt=0, description="of the ranges, for each point of the grid")
    draw_seed: int = Field(default=0, ge=0, description="another one draws other values")
    max_concurrent: int | None = Field(default=None, gt=0, description="trials at once; as many as fit unless given")
    stops_early: bool = Field(
        default=True, description="stop trials with a high held-out loss (ASHA; needs evaluation.interval_steps)"
    )

    def plan(
        self, recipe: TrainSpec, load: Callable[[dict[str, Any]], TrainSpec], *, folder: str, most: int = MAX_TRIALS
    ) -> SweepPlan:
        """All trials of `recipe`. `load` makes the recipe with values on top of it; relative data start at `folder`.

        Raises SpecError where nothing varies or what may not, for more trials than `most`, for one whose recipe is not
        valid, and for a recipe that holds nothing out.
        """
        grid, ranges = [grid_axis(text) for text in self.grid], [random_axis(text) for text in self.ranges]
        found = points(grid, ranges, self.num_draws, seed=self.draw_seed)
        if len(found) > most:
            raise SpecError(f"these are {len(found)} trials, and {most} are the most here: vary less")
        if recipe.data.eval is None and not recipe.data.eval_fraction:
            raise SpecError("a sweep compares trials by their held-out loss: give data.eval, or a data.eval_fraction")
        return SweepPlan(
            recipe=recipe,
            folder=folder,
            trials=expand(found, load),
            max_concurrent=self.max_concurrent,
            stops_early=self.stops_early,
        )
