"""A sweep's specification becomes its trials, or says why not."""

from __future__ import annotations

from typing import Any

import pytest

from jobs.sweeps.spec import SweepSpec
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
