"""A sweep's trials are found by its job, and read while it runs."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from jobs.sweeps.history import SweepTrials
from jobs.sweeps.trials import PLAN, SweepPlan, Trial, TrialRecord, record_file
from loray.errors import StoreError
from loray.recipes.load import load_recipe
from loray.settings import Settings

BEGAN = datetime(2026, 1, 2, 12, tzinfo=UTC)


def test_trials_are_read_as_they_are_written(tmp_path: Path) -> None:
    settings, recipe = Settings.from_env({"LORAY_HOME": str(tmp_path)}), load_recipe("lora_smollm2").spec
    trials = SweepTrials(settings, "acme/tone", "sweep_1", BEGAN)
    assert trials.read() is None
    folder = tmp_path / "sweeps" / "_acme" / "tone" / "20260102-120001-000000"
    folder.mkdir(parents=True)
    (folder / "job_id").write_text("sweep_1")
    assert trials.read() is None  # its plan is not written yet
    plan = SweepPlan(
        recipe=recipe,
        folder="/",
        trials=tuple(Trial(values={"adapter.rank": rank}, recipe=recipe) for rank in ("4", "8")),
    )
    (folder / PLAN).write_text(plan.model_dump_json())
    (folder / record_file(1)).write_text('{"trial": 1, "val')
    found = trials.read()
    assert found is not None
    assert [(r.trial, r.values["adapter.rank"], r.status) for r in found.records] == [
        (0, "4", "running"),
        (1, "8", "running"),
    ]
    ended = TrialRecord(trial=1, values={"adapter.rank": "8"}, status="completed", num_steps=3, losses=((3, 1.0),))
    (folder / record_file(1)).write_text(ended.model_dump_json())
    found = trials.read()
    assert found is not None
    assert (found.records[1], found.num_trials, found.keep_best) == (ended, 2, recipe.evaluation.keep_best)
    (folder / record_file(1)).unlink()  # it is read once
    assert trials.read() == found


def test_a_plan_that_is_none_is_an_error(tmp_path: Path) -> None:
    folder = tmp_path / "sweeps" / "tone" / "20260102-120001-000000"
    folder.mkdir(parents=True)
    (folder / "job_id").write_text("sweep_1")
    (folder / PLAN).write_text("[]")
    with pytest.raises(StoreError, match="no sweep's plan"):
        SweepTrials(Settings.from_env({"LORAY_HOME": str(tmp_path)}), "tone", "sweep_1", BEGAN).read()
