"""A sweep's trials are found by its job, and read while it runs."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from jobs.sweeps import history
from jobs.sweeps.history import SweepTrials
from jobs.sweeps.spec import PLAN, SweepPlan, Trial, TrialRecord, record_file
from loray.errors import StoreError
from loray.recipes.load import load_recipe
from loray.settings import Settings
from serve_apps.console.runs import rank

BEGAN = datetime(2026, 1, 2, 12, tzinfo=UTC)


RECIPE = load_recipe("lora_smollm2").spec


def sweep(home: Path, name: str) -> tuple[SweepTrials, Path]:
    """A sweep that has begun, and its folder."""
    folder = home / "sweeps" / name / "20260102-120001-000000"
    folder.mkdir(parents=True)
    (folder / "job_id").write_text("sweep_1")
    return trials_of(home, name.removeprefix("_")), folder


def trials_of(home: Path, name: str) -> SweepTrials:
    return SweepTrials(Settings.from_env({"LORAY_HOME": str(home)}), name, "sweep_1", BEGAN)


def plan(*ranks: str) -> SweepPlan:
    trials = tuple(Trial(values={"adapter.rank": rank}, recipe=RECIPE) for rank in ranks)
    return SweepPlan(recipe=RECIPE, folder="/", trials=trials)


def test_trials_are_read_as_they_are_written(tmp_path: Path) -> None:
    trials = trials_of(tmp_path, "acme/tone")
    assert trials.read() is None
    _, folder = sweep(tmp_path, "_acme/tone")
    assert trials.read() is None  # its plan is not written yet
    (folder / PLAN).write_text(plan("4", "8").model_dump_json())
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
    assert (found.records[1], len(found.records), found.keep_best) == (ended, 2, RECIPE.evaluation.keep_best)
    (folder / record_file(1)).unlink()  # it is read once
    assert trials.read() == found


def test_a_look_reads_what_may_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "MOST_READ", 3)
    (trials, folder), several = sweep(tmp_path, "tone"), plan(*"12345")
    (folder / PLAN).write_text(several.model_dump_json())

    def write(number: int, **fields: Any) -> None:
        record = TrialRecord(trial=number, values=several.trials[number].values, losses=((1, 5.0 - number),), **fields)
        (folder / record_file(number)).write_text(record.model_dump_json())

    for number in range(5):
        write(number, status="running" if number == 0 else "completed")
    read, content = [], history._content

    def counted(filesystem: Any, path: str) -> bytes:
        read.append(path[-6])
        return content(filesystem, path)

    monkeypatch.setattr(history, "_content", counted)

    def look() -> tuple[str, bool, int | None]:
        read.clear()
        found = trials.read()
        assert found is not None
        return "".join(read), found.is_whole, rank(found).best

    assert look() == ("n012", False, None)  # and the plan
    assert look() == ("340", True, 4)
    assert look() == ("0", True, 4)  # it runs
    write(0, status="stopped")
    assert (look(), look()) == (("0", True, 4), ("", True, 4))


def test_a_plan_that_is_none_is_an_error(tmp_path: Path) -> None:
    trials, folder = sweep(tmp_path, "tone")
    (folder / PLAN).write_text("[]")
    with pytest.raises(StoreError, match="no sweep's plan"):
        trials.read()
