"""A sweep's specification becomes its trials, or says why not."""

from __future__ import annotations

import math
from typing import Any

import pytest

from jobs.sweeps.spec import SweepSpec, grid_axis, points, random_axis
from loray.errors import SpecError
from loray.recipes.defaults import complete, size_of
from loray.recipes.fields import merge
from loray.spec import TrainSpec


def load(values: dict[str, Any], **data: Any) -> TrainSpec:
    fields = merge({"name": "tone", "data": {"train": "/d.jsonl"} | data}, values)
    return TrainSpec.parse(complete(fields, size_of(None)), source="the recipe")


def test_a_specification_becomes_a_plan() -> None:
    asked = SweepSpec(grid=("adapter.rank=4,8",), ranges=("seed=randint(0,1000)",), num_draws=2, max_concurrent=3)
    plan = asked.plan(load({}), load, folder="/")
    assert (plan.name, plan.folder, plan.max_concurrent, plan.stops_early) == ("tone", "/", 3, True)
    assert [trial.recipe.adapter.rank for trial in plan.trials] == [4, 4, 8, 8]
    assert plan == asked.plan(load({}), load, folder="/")
    assert plan != asked.model_copy(update={"draw_seed": 1}).plan(load({}), load, folder="/")


def test_what_cannot_be_compared_is_refused() -> None:
    asked = SweepSpec(grid=("adapter.rank=4,8,16",))
    with pytest.raises(SpecError, match=r"give data\.eval, or a data\.eval_fraction"):
        asked.plan(load({}, eval_fraction=0), load, folder="/")
    with pytest.raises(SpecError, match="nothing varies"):
        SweepSpec(max_concurrent=2).plan(load({}), load, folder="/")


def test_a_grid_is_each_value_with_each() -> None:
    axes = [grid_axis("adapter.rank=8,16"), grid_axis("adapter.target_modules=[q_proj],[q_proj, v_proj]")]
    assert points(axes, [], None, seed=0) == [
        {"adapter.rank": rank, "adapter.target_modules": modules}
        for rank in ("8", "16")
        for modules in ("[q_proj]", "[q_proj, v_proj]")
    ]


def test_draws_are_within_their_ranges_and_depend_on_the_seed_alone() -> None:
    ranges = [
        random_axis("optimizer.learning_rate=loguniform(1e-5,1e-2)"),
        random_axis("adapter.dropout=uniform(0,0.2)"),
        random_axis("adapter.rank=randint(4,8)"),
        random_axis("batch.accumulation=lograndint(1,64)"),
        random_axis("adapter.method=lora,dora"),
    ]
    found = points([grid_axis("seed=1,2")], ranges, 40, seed=7)
    assert found == points([grid_axis("seed=1,2")], ranges, 40, seed=7) != points([], ranges, 40, seed=8)
    assert len(found) == 80
    rates = [float(values["optimizer.learning_rate"]) for values in found]
    assert all(1e-5 <= rate < 1e-2 for rate in rates)
    assert 5 < sum(rate < 10**-3.5 for rate in rates) < 75  # the logarithm is uniform
    assert {values["adapter.rank"] for values in found} == {"4", "5", "6", "7"}
    assert all(0 <= float(values["adapter.dropout"]) <= 0.2 for values in found)
    accumulations = [int(values["batch.accumulation"]) for values in found]
    assert min(accumulations) >= 1
    assert max(accumulations) < 64
    assert math.exp(sum(map(math.log, accumulations)) / 80) < 16
    assert {values["adapter.method"] for values in found} == {"lora", "dora"}


def test_a_point_that_is_drawn_twice_is_one_trial() -> None:
    assert len(points([], [random_axis("adapter.rank=8,16")], 50, seed=0)) == 2


@pytest.mark.parametrize(
    ("grid", "ranges", "num", "message"),
    [
        ((), (), None, "nothing varies"),
        (("adapter.rank",), (), None, "write it as adapter.rank=8,16"),
        (("adapter.rank=8,,16",), (), None, "empty value"),
        (("adapter.rank=8,8",), (), None, "names a value twice"),
        (("adapter.rank=8", "adapter.rank=9"), (), None, "varies twice"),
        (("data.train=a,b",), (), None, "can be compared"),
        (("name=a,b",), (), None, "cannot vary"),
        (("adapter.rank=8",), ("seed=1,2",), None, "--random N"),
        (("adapter.rank=8",), (), 3, "nothing to draw from"),
        ((), ("seed=randint(1,5000)",), 1001, "1,001 trials"),
        ((), ("adapter.rank=normal(1,2)",), 1, "there is no range 'normal'"),
        ((), ("adapter.rank=randint(1)",), 1, "is no range"),
        ((), ("adapter.rank=randint(1.5,4)",), 1, "whole numbers"),
        ((), ("adapter.rank=randint(8,4)",), 1, "below the second"),
        ((), ("optimizer.learning_rate=loguniform(0,1)",), 1, "above 0"),
        ((), ("optimizer.learning_rate=uniform(0,nan)",), 1, "below the second"),
        ((), ("optimizer.learning_rate=uniform(a,b)",), 1, "two numbers"),
    ],
)
def test_what_is_refused(grid: tuple[str, ...], ranges: tuple[str, ...], num: int | None, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        points([grid_axis(text) for text in grid], [random_axis(text) for text in ranges], num, seed=0)
