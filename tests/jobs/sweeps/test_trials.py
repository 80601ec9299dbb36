"""Trials: their recipes, their records and rank, the picture, and what they are stopped by."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from click.testing import CliRunner
from pyarrow import fs

from jobs.runs.folders import RunFolder
from jobs.sweeps.command import draw, sweep
from jobs.sweeps.driver import TrialRecords, _prepare
from jobs.sweeps.halving import Halving, falls_behind, name_of_trial, told
from jobs.sweeps.spec import SweepPlan, Trial, TrialRecord, best, expand, label, ranked
from loray.catalog import Catalog
from loray.errors import LorayError, SpecError
from loray.recipes.load import Recipe, load_recipe
from loray.settings import Settings
from loray.spec import TrainSpec
from tests.fixtures.recipes import write


def record(trial: int, status: Any = "completed", *losses: float) -> TrialRecord:
    steps = tuple((10 * (i + 1), loss) for i, loss in enumerate(losses))
    return TrialRecord(trial=trial, values={"adapter.rank": str(trial)}, status=status, num_steps=90, losses=steps)


RECORDS = (
    record(0, "completed", 3.0, 2.5),
    record(1, "stopped", 1.0),
    record(2, "completed", 2.0, 2.6),
    record(3, "failed"),
)


def test_the_best_is_a_completed_trial_by_the_checkpoint_that_is_published() -> None:
    assert [r.trial for r in ranked(RECORDS, keep_best=True)] == [2, 0, 1, 3]
    assert [(best(RECORDS, keep_best=keep) or RECORDS[3]).trial for keep in (True, False)] == [2, 0]
    assert best(RECORDS[1:2], keep_best=True) is None
    assert best((record(0),), keep_best=True) is None


def test_a_resumed_trial_measures_steps_again() -> None:
    made = record(0, "running", 3.0, 2.5).with_loss(20, 2.25, 90).with_loss(30, 2.0, 90)
    assert made.losses == ((10, 3.0), (20, 2.25), (30, 2.0))


def test_every_trial_is_a_whole_recipe_with_the_defaults_of_its_method(tmp_path: Path) -> None:
    recipe = write(tmp_path, optimizer={})

    def load(values: dict[str, Any]) -> TrainSpec:
        return load_recipe(str(recipe.path), over=values).spec

    lora, vera = expand([{"adapter.method": "lora"}, {"adapter.method": "vera", "adapter.rank": "64"}], load)
    assert (lora.recipe.adapter.rank, vera.recipe.adapter.rank) == (4, 64)
    assert vera.recipe.optimizer.learning_rate > lora.recipe.optimizer.learning_rate
    with pytest.raises(SpecError, match=r"trial rank=0: .*"):
        expand([{"adapter.rank": "8"}, {"adapter.rank": "0"}], load)
    assert label({"a.rank": "1", "b.rank": "2", "seed": "3"}) == "a.rank=1 b.rank=2 seed=3"


def test_the_picture_has_a_line_for_each_trial_that_was_measured() -> None:
    root = ElementTree.fromstring(draw("tone <1>", RECORDS, 2))
    lines = [path for path in root.findall(".//{*}path") if path.get("fill") == "none"]
    titles = [title.text for line in lines for title in line]
    assert titles == ["1: rank=1", "0: rank=0", "2: rank=2"]  # the best on top
    assert [bool(line.get("stroke-dasharray")) for line in lines] == [True, False, False]
    assert draw("none", (record(0, "failed"),), None).count("<svg") == 1
    assert "and 5 more" in draw("many", [record(i, "completed", 1.0) for i in range(25)], 0)


def plan_of(recipe: TrainSpec, num: int, **fields: Any) -> SweepPlan:
    trials = tuple(Trial(values={"adapter.rank": str(i)}, recipe=recipe) for i in range(num))
    return SweepPlan(recipe=recipe, folder=".", trials=trials, **fields)


def test_records_outlive_the_driver_and_stop_trials_of_the_next(tmp_path: Path) -> None:
    folder = RunFolder(fs.LocalFileSystem(), str(tmp_path / "sweep"))
    Path(folder.path).mkdir()
    plan, changed = plan_of(write(tmp_path).spec, 4), []
    records = TrialRecords(folder, plan, changed.append)
    for made in (record(0, "completed", 1.0, 0.9), record(1, "completed", 1.1, 0.8), record(2, "running", 2.0)):
        records.put(made)
    assert [made.trial for made in changed] == [0, 1, 2]
    Path(folder.path, "trial_0003.json").write_text('{"trial": 3, "va')  # killed while it wrote
    again = TrialRecords(folder, plan, changed.append)
    assert list(again) == [*list(records)[:3], TrialRecord(trial=3, values={"adapter.rank": "3"})]


def event_of(event: str, **fields: Any) -> Any:
    return {"event": event, "subject": "adapter"} | fields


def test_trials_that_come_to_a_rung_together_are_ranked_among_each_other() -> None:
    names = [name_of_trial(i) for i in range(6)]
    records = [TrialRecord(trial=i, values={"adapter.rank": str(i)}) for i in range(6)]

    def at(step: int, *losses: float) -> list[tuple[str, Any]]:
        return [(name, event_of("eval", step=step, eval_loss=x)) for name, x in zip(names, losses, strict=False)]

    judges = [Halving(records, stops_early=stops) for stops in (True, False)]
    for judge in judges:
        assert not judge.ended_by([(name, event_of("start", num_steps=90)) for name in names])
        assert not judge.ended_by(at(9, *range(6)))  # before the first rung
    assert judges[0].ended_by(at(10, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)) == set(names[2:])
    assert not judges[1].ended_by(at(10, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0))
    assert not judges[0].ended_by(at(20, 9.0, 8.0))  # they have passed this rung
    assert judges[0].ended_by(at(30, 2.0, 1.0)) == {names[0]}


def test_what_a_run_tells_becomes_its_record() -> None:
    made = record(0, "running")
    for event in (
        event_of("start", num_steps=40),
        event_of("eval", step=0, subject="base", eval_loss=9.0),
        event_of("eval", step=10, eval_loss=3.0),
        event_of("eval", step=20, eval_loss=None),
    ):
        made = told(made, event)
    assert (made.num_steps, made.losses, made.status) == (40, ((10, 3.0),), "running")
    for status, ours, message in (
        ("succeeded", "completed", None),
        ("failed", "failed", "why"),
        ("stopped", "stopped", None),
    ):
        ended = told(made, event_of("end", step=20, status=status, message=message))
        assert (ended.status, ended.message) == (ours, message or "")


def test_a_trial_that_is_not_among_the_best_third_falls_behind() -> None:
    others = [record(i, "stopped" if i else "running", *([1.0 + i] * 2)) for i in range(4)]  # at 10 and 20 of 90 steps
    for step, loss, expected in (
        (9, 9.0, False),  # before the first rung
        (10, 1.9, False),
        (10, 2.1, True),
        (40, 9.0, False),  # the first one so late
    ):
        assert falls_behind(record(4, "running").with_loss(step, loss, 90), others) is expected
    assert not falls_behind(record(4, "running", 1.0, 9.0), others)  # it has passed this rung
    assert falls_behind(record(4, "running", 1.0).with_loss(30, 9.0, 90), [*others, record(5, "failed", 1, 1, 1)])


def test_data_is_read_once_and_losses_must_be_comparable(tmp_path: Path, settings: Settings) -> None:
    recipe, catalog = write(tmp_path).spec, Catalog(settings.catalog)

    def prepared(*recipes: TrainSpec) -> Any:
        return _prepare([Recipe(made, None, tmp_path) for made in recipes], settings, catalog)

    first, second = prepared(recipe, recipe.model_copy(update={"max_steps": 9}))
    assert first.data is second.data
    with pytest.raises(SpecError, match="measured on different rows"):
        prepared(recipe, recipe.model_copy(update={"seed": 1}))
    with pytest.raises(SpecError, match=r"give data\.eval, or a data\.eval_fraction"):
        prepared(write(tmp_path, data={"train": "data.jsonl", "eval_fraction": 0}).spec)


def test_the_command_checks_everything_before_it_starts_anything(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAY_HOME", str(settings.home))
    write(tmp_path)
    recipe = str(tmp_path / "recipe.yaml")

    def call(*args: str) -> Any:
        return CliRunner().invoke(sweep, list(args))

    shown = call(recipe, "--grid", "adapter.rank=2,4", "--grid", "optimizer.learning_rate=1e-3,1e-2", "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert "trial 3: rank=4 learning_rate=1e-2" in shown.output
    assert "plan: " in shown.output
    alone = call("--name", "tone", "--base", "tiny", "--data", str(tmp_path / "data.jsonl"), "--random", "2")
    assert "nothing varies" in str(alone.exception)
    drawn = call(
        "adapter.rank=randint(2,9)", "--name", "tone", "--base", "tiny", "--data", str(tmp_path / "data.jsonl"),
        "--random", "3", "--dry-run",
    )  # fmt: skip
    assert "trial 0: rank=" in drawn.output
    for args, message in (
        ((recipe, "--grid", "adapter.rnk=1,2"), "did you mean adapter.rank"),
        ((recipe, "--grid", "optimizer.learning_rate=1e-3,fast"), "trial learning_rate=fast"),
        ((recipe, "--resume", "tone"), "as it was"),
        ((recipe, "--grid", "data.max_length=32,64"), "cannot vary"),
    ):
        assert message in str(call(*args).exception)
        assert isinstance(call(*args).exception, LorayError)
    monkeypatch.setenv("LORAY_URL", "http://127.0.0.1:1")
    assert "give its --address" in str(call(recipe, "--grid", "adapter.rank=2,4").exception)
