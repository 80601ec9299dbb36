"""The driver's own decisions, without a cluster: what is published from a run, and by whom."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from ray.job_submission import JobStatus
from ray.train import Checkpoint

from jobs import command, submission, worker
from jobs import train as driver
from jobs.events import decode
from jobs.prepare import prepare
from jobs.recipe import Recipe
from loray.bases.registry import add_base, get_base
from loray.catalog import Catalog
from loray.errors import BaseMismatch, ConflictError, LorayError, UnsupportedError
from loray.settings import Settings
from loray.train import checkpoint
from loray.train.loop import train
from loray.train.reporting import FolderReporter
from tests.jobs.test_recipe import write
from tests.tiny import write_checkpoint


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    add_base(str(write_checkpoint(tmp_path / "checkpoint", std=0.05)), home=tmp_path / "home", name="tiny")
    return Settings.from_env({"LORAY_HOME": str(tmp_path / "home")})


def trained(recipe: Recipe, settings: Settings, workdir: Path) -> tuple[Path, Any]:
    """A run folder and Ray's result of it: every checkpoint, the latest last."""
    prepared = prepare(recipe, settings)
    folder = driver._new_run(settings, recipe)
    reporter = FolderReporter(folder)
    train(prepared.spec, prepared.base, prepared.data, reporter=reporter, workdir=workdir)
    return folder, result(reporter)


def result(reporter: FolderReporter) -> Any:
    saved = [(Checkpoint(str(c.path)), {"eval_loss": c.eval_loss}) for c in reporter.checkpoints]
    return SimpleNamespace(checkpoint=saved[-1][0], best_checkpoints=saved)


def publish(made: Any, folder: Path, recipe: Recipe, settings: Settings) -> dict[str, Any]:
    events: list[dict[str, Any]] = []
    driver._publish_best(made, folder, recipe, settings, events.append)
    return events[0]


def test_checkpoints_without_an_evaluation_come_last() -> None:
    checkpoints = [(name, {"eval_loss": loss}) for name, loss in (("a", None), ("b", 2.0), ("c", 3.0))]
    made = SimpleNamespace(checkpoint="latest", best_checkpoints=checkpoints)
    assert driver._best(made, by_loss=True) == "b"
    assert driver._best(made, by_loss=False) == "latest"
    made.best_checkpoints = checkpoints[:1]
    assert driver._best(made, by_loss=True) == "latest"
    scores = [worker.score(metrics["eval_loss"]) for _, metrics in checkpoints]
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    assert min(scores) == 2.0


def test_a_run_without_held_out_data_publishes_its_end(tmp_path: Path, settings: Settings) -> None:
    recipe = write(tmp_path, dtype="float32", data={"train": "data.jsonl", "eval_fraction": 0})
    folder, made = trained(recipe, settings, tmp_path)
    event = publish(made, folder, recipe, settings)
    assert (event["label"], event["step"], event["evaluations"]) == ("arithmetic@1", 2, [])


def test_what_is_published_is_the_checkpoints_recipe(tmp_path: Path, settings: Settings) -> None:
    folder, made = trained(write(tmp_path, dtype="float32", data={"train": "data.jsonl"}), settings, tmp_path)
    optimizer = {"learning_rate": 0.5}
    today = write(tmp_path, dtype="float32", base="other", optimizer=optimizer, publish={"licence": "CC0-1.0"})
    publish(made, folder, today, settings)
    manifest = Catalog(settings.catalog).adapter("arithmetic").versions[-1].manifest
    assert manifest.recipe is not None
    assert (manifest.recipe.base, manifest.recipe.optimizer.learning_rate) == ("tiny", 0.01)
    assert manifest.recipe.data.max_length == 512
    assert manifest.licence == "CC0-1.0"


def test_another_base_under_the_same_name_is_refused(tmp_path: Path, settings: Settings) -> None:
    recipe = write(tmp_path, dtype="float32")
    folder, made = trained(recipe, settings, tmp_path)
    state = folder / "step_000002" / checkpoint.RunState.FILE
    fingerprint = get_base(settings.home, "tiny").fingerprint
    state.write_text(state.read_text().replace(fingerprint, "0" * 64))
    with pytest.raises(BaseMismatch, match="tiny is now another model"):
        publish(made, folder, recipe, settings)


def test_a_publication_is_the_same_from_another_job(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(tmp_path, dtype="float32")
    monkeypatch.setattr(driver, "_job_id", lambda: "first")
    folder, made = trained(recipe, settings, tmp_path)
    first = publish(made, folder, recipe, settings)
    monkeypatch.setattr(driver, "_job_id", lambda: "second")
    assert publish(made, folder, recipe, settings) == first
    (version,) = Catalog(settings.catalog).adapter("arithmetic").versions
    assert version.manifest.job_id == "first"


def test_a_run_folder_has_one_driver(tmp_path: Path) -> None:
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"
    other = subprocess.Popen(
        [sys.executable, "-c", hold, str(tmp_path / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert other.stdout is not None
    other.stdout.readline()
    with pytest.raises(ConflictError, match="another driver is at work on the run"), driver._locked(tmp_path):
        pass
    other.communicate(b"\n")
    with driver._locked(tmp_path) as folder:
        assert folder == tmp_path


def test_other_weights_under_a_known_base_are_refused_before_training(tmp_path: Path, settings: Settings) -> None:
    Catalog(settings.catalog).add_base("tiny", "0" * 64)
    with pytest.raises(ConflictError, match="knows base model 'tiny' with fingerprint 000000000000"):
        driver.train(write(tmp_path), settings, print)
    assert not (settings.home / "runs").exists()


def test_an_unexpected_error_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(driver, "train", full)
    outcome = CliRunner().invoke(driver.main, [str(write(tmp_path).path), "--events"])
    assert outcome.exit_code == 1
    (line,) = outcome.stdout.splitlines()
    event = decode(line)
    assert event is not None
    assert event["kind"] == "OSError"
    assert event["message"].startswith("OSError: [Errno 28] No space left on device")


def test_only_checkpoints_go_through_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reported: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.train.report", lambda metrics, **_: reported.append(metrics))
    path = tmp_path / "events.jsonl"
    for rank in (0, 1):
        reporter = worker.RayReporter(path, rank)
        reporter.report({"event": "step", "step": 1}, None)
        reporter.report({"event": "checkpoint", "step": 1, "eval_loss": None}, None)
    assert [decode(line) for line in path.read_text().splitlines()] == [{"event": "step", "step": 1}]
    assert [m["event"] for m in reported] == ["checkpoint"] * 2
    assert reported[0]["score"] == sys.float_info.max


def test_an_error_on_another_rank_ends_this_one_too(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = SimpleNamespace(rank=0, gather=lambda problem: [problem, "rank 1 has no such base"])
    monkeypatch.setattr(worker, "World", SimpleNamespace(current=lambda: world))
    monkeypatch.setattr(worker, "_num_threads", lambda: 1)
    monkeypatch.setattr(worker, "_train", lambda *_: pytest.fail("trained"))
    config = worker.WorkerConfig(
        recipe=write(tmp_path).spec.model_dump(mode="json"),
        home=str(settings.home),
        base_fingerprint=get_base(settings.home, "tiny").fingerprint,
        log_level="WARNING",
        events=str(tmp_path / "events.jsonl"),
        data=None,
    )
    assert worker.run(config) == "rank 1 has no such base"
    config["base_fingerprint"] = "0" * 64
    assert "another model on this worker's machine" in (worker.run(config) or "")


# -- following a job --------------------------------------------------------------------------------------------------


class Flaky:
    """A job server that sends one more line each time and then loses the connection."""

    def __init__(self, num_lines: int, lines_at_once: int) -> None:
        self.num_lines, self.lines_at_once, self.calls = num_lines, lines_at_once, 0

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        self.calls += 1
        shown = min(self.num_lines, self.calls * self.lines_at_once)
        yield "".join(f"{i}\n" for i in range(shown))
        if shown < self.num_lines or not self.lines_at_once:
            raise RuntimeError("connection lost")

    def get_job_status(self, job: str) -> JobStatus:
        if self.calls < 2:
            raise ConnectionError("no answer")
        return JobStatus.SUCCEEDED


def test_a_connection_that_still_brings_lines_is_taken_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_RECONNECT_S", 0)
    lines: list[str] = []
    asyncio.run(command._follow(Flaky(12, 1), "job", lines.append))
    assert lines == [str(i) for i in range(12)]
    dead = Flaky(12, 0)
    with pytest.raises(LorayError, match="lost the connection"):
        asyncio.run(command._follow(dead, "job", lines.append))
    assert dead.calls == 5


def test_a_store_that_is_not_there_yet_is_refused_at_submission(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission, "local", lambda *_, **__: pytest.fail("submitted"))
    for name, value in (settings.to_env() | {"LORAY_STORE": "s3://bucket/loray"}).items():
        monkeypatch.setenv(name, value)
    outcome = CliRunner().invoke(command.train, [str(write(tmp_path).path)])
    assert isinstance(outcome.exception, UnsupportedError)
    assert "s3:// is not supported yet" in str(outcome.exception)
