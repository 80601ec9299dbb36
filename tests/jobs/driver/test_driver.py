"""The driver's decisions, without a cluster: what it publishes from a run, and how the command follows a job."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner
from ray.train import Checkpoint

from jobs import command
from jobs import train as driver
from jobs.driver import fit
from jobs.driver.fit import check_resources
from jobs.driver.prepare import prepare
from jobs.driver.publication import already_published, best, publish_best
from jobs.events import decode
from jobs.runs.folders import RunFolder, open_runs, score
from jobs.submission import commands
from jobs.submission.tracker import RayJob
from jobs.workers import worker
from jobs.workers import worker as threads
from loray.bases.registry import add_base, get_base
from loray.catalog import Catalog
from loray.errors import BaseMismatch, ClusterError, ConflictError, LorayError, SpecError, StoreError
from loray.methods.attach import InitialAdapter
from loray.recipes.load import Recipe
from loray.settings import Settings
from loray.train import checkpoint
from loray.train.checkpoint import FolderReporter
from loray.train.loop import train
from tests.fixtures.cluster import free_port
from tests.fixtures.tiny import write_checkpoint
from tests.test_recipe import write


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    add_base(str(write_checkpoint(tmp_path / "checkpoint", std=0.05)), home=tmp_path / "home", name="tiny")
    return Settings.from_env({"LORAY_HOME": str(tmp_path / "home")})


def trained(recipe: Recipe, settings: Settings, workdir: Path) -> tuple[RunFolder, Any]:
    """A run and Ray's result of it, with every checkpoint, the latest last."""
    prepared = prepare(recipe, settings)
    run = open_runs(settings).new(recipe.spec.name, "first")
    reporter = FolderReporter(Path(run.path))
    with ExitStack() as stack:
        files = prepared.initial
        initial = files and InitialAdapter(files.digest, stack.enter_context(files.as_folder()))
        train(prepared.spec, prepared.base, prepared.data, reporter=reporter, workdir=workdir, initial=initial)
    return run, result(reporter)


def result(reporter: FolderReporter) -> Any:
    saved = [(Checkpoint(str(c.path)), {"eval_loss": c.eval_loss}) for c in reporter.checkpoints]
    return SimpleNamespace(checkpoint=saved[-1][0], best_checkpoints=saved)


def test_checkpoints_without_an_evaluation_come_last() -> None:
    checkpoints = [(name, {"eval_loss": loss}) for name, loss in (("a", None), ("b", 2.0), ("c", 3.0))]
    made = SimpleNamespace(checkpoint="latest", best_checkpoints=checkpoints)
    assert best(made, by_loss=True) == "b"
    assert best(made, by_loss=False) == "latest"
    made.best_checkpoints = checkpoints[:1]
    assert best(made, by_loss=True) == "latest"
    scores = [score(metrics["eval_loss"]) for _, metrics in checkpoints]
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores
    assert min(scores) == 2.0


def test_a_run_without_held_out_data_publishes_its_end(tmp_path: Path, settings: Settings) -> None:
    recipe = write(tmp_path, dtype="float32", data={"train": "data.jsonl", "eval_fraction": 0})
    run, made = trained(recipe, settings, tmp_path)
    event = publish_best(made, run, recipe, settings)
    assert (event["label"], event["step"], event["evaluations"]) == ("arithmetic@1", 2, [])


def test_what_is_published_is_the_checkpoints_recipe(tmp_path: Path, settings: Settings) -> None:
    run, made = trained(write(tmp_path, dtype="float32", data={"train": "data.jsonl"}), settings, tmp_path)
    optimizer = {"learning_rate": 0.5}
    today = write(tmp_path, dtype="float32", base="other", optimizer=optimizer, publish={"licence": "CC0-1.0"})
    publish_best(made, run, today, settings)
    manifest = Catalog(settings.catalog).adapter("arithmetic").versions[-1].manifest
    assert manifest.recipe is not None
    assert (manifest.recipe.base, manifest.recipe.optimizer.learning_rate) == ("tiny", 0.01)
    assert manifest.recipe.data.max_length == 512
    assert manifest.licence == "CC0-1.0"


def test_another_base_under_the_same_name_is_refused(tmp_path: Path, settings: Settings) -> None:
    recipe = write(tmp_path, dtype="float32")
    run, made = trained(recipe, settings, tmp_path)
    state = Path(run.path) / "step_000002" / checkpoint.RunState.FILE
    fingerprint = get_base(settings.home, "tiny").fingerprint
    state.write_text(state.read_text().replace(fingerprint, "0" * 64))
    with pytest.raises(BaseMismatch, match="another model on this machine"):
        publish_best(made, run, recipe, settings)


def test_a_publication_carries_the_job_that_created_the_run(tmp_path: Path, settings: Settings) -> None:
    recipe = write(tmp_path, dtype="float32")
    run, made = trained(recipe, settings, tmp_path)
    assert already_published(run, recipe) is None
    first = publish_best(made, run, recipe, settings)
    resumed = open_runs(settings).latest(recipe.spec.name)
    assert publish_best(made, resumed, recipe, settings) == first == already_published(resumed, recipe)
    (version,) = Catalog(settings.catalog).adapter("arithmetic").versions
    assert version.manifest.job_id == "first"
    assert already_published(resumed, write(tmp_path, dtype="float32", max_steps=9)) is None
    resumed.write("published.json", b'{"recipe"')
    assert already_published(resumed, recipe) is None
    assert publish_best(made, resumed, recipe, settings) == first


def test_publishing_again_from_a_bucket_is_no_second_version(tmp_path: Path, settings: Settings) -> None:
    """A checkpoint that Ray downloads from a bucket has the time of the download."""
    recipe = write(tmp_path, dtype="float32")
    run, made = trained(recipe, settings, tmp_path)
    first = publish_best(made, run, recipe, settings)
    for number, path in enumerate(Path(run.path).rglob("*.safetensors")):
        os.utime(path, (number, number))
    assert publish_best(made, run, recipe, settings) == first
    (version,) = Catalog(settings.catalog).adapter("arithmetic").versions
    assert datetime.now(UTC) - datetime.fromisoformat(version.manifest.created_at) < timedelta(hours=1)


def test_threads_are_those_that_the_nodes_environment_sets() -> None:
    for environ, expected in (
        (b"A=1\0OMP_NUM_THREADS=4\0B=2\0", 4),
        (b"OMP_NUM_THREADS=3,2\0", 3),
        (b"MY_OMP_NUM_THREADS=4\0", None),
        (b"OMP_NUM_THREADS=\0", None),
        (b"", None),
    ):
        assert threads.preset_threads(environ) == expected


def test_the_driver_waits_for_what_an_autoscaler_may_add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, settings = write(tmp_path, num_workers=3), Settings.from_env({})
    in_a_group = Settings.from_env({"LORAY_TRAINING_GROUP": "training"})
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(fit, "_RAY_UP_CONFIG", tmp_path / "ray_bootstrap_config.yaml")
    monkeypatch.setenv("KUBERAY_GEN_RAY_START_CMD", "ray start --head --num-cpus=0")
    with pytest.raises(SpecError, match="num_workers is 3, but the cluster has 2 CPUs"):
        check_resources(recipe.spec, settings)
    with pytest.raises(SpecError, match="num_workers is 3, but the cluster has 0 of the resource training_worker"):
        check_resources(recipe.spec, in_a_group)
    warned: list[str] = []
    monkeypatch.setattr(fit.log, "warning", lambda text, *args: warned.append(text % args))
    monkeypatch.setenv("KUBERAY_GEN_RAY_START_CMD", "ray start --head --no-monitor --num-cpus=0")
    check_resources(recipe.spec, settings)
    monkeypatch.setenv("KUBERAY_GEN_RAY_START_CMD", "ray start --address=head:6379")  # nobody else adds such nodes
    check_resources(recipe.spec, in_a_group)
    monkeypatch.delenv("KUBERAY_GEN_RAY_START_CMD")
    (tmp_path / "ray_bootstrap_config.yaml").touch()
    check_resources(recipe.spec, settings)
    assert len(warned) == 3
    assert "waiting for its autoscaler" in warned[0]


def test_after_a_store_error_the_checkpoint_can_be_published_later(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = write(tmp_path, dtype="float32")
    run, made = trained(recipe, settings, tmp_path)
    monkeypatch.setattr(RunFolder, "result", lambda run: made)
    with monkeypatch.context() as patch:

        def gone(url: str) -> None:
            raise StoreError("connection refused")

        patch.setattr("jobs.driver.publication.open_store", gone)
        with pytest.raises(StoreError, match=r"refused; training is complete: .*recipe\.yaml --publish-checkpoint"):
            driver._publish(made, run, recipe, settings, print)
    catalog, events = Catalog(settings.catalog), list[dict[str, Any]]()
    catalog.add_job("first", name=recipe.spec.name, recipe=recipe.spec)
    driver.publish_latest(recipe, settings, events.append)
    assert [e["label"] for e in events] == ["arithmetic@1"]
    assert (catalog.job("first").status, catalog.job("first").version) == ("succeeded", 1)


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


def test_an_error_on_another_rank_ends_this_one_too(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = SimpleNamespace(rank=0, gather=lambda problem: [problem, "rank 1 has no such base"])
    monkeypatch.setattr(worker, "World", SimpleNamespace(current=lambda: world))
    monkeypatch.setattr(worker, "num_threads", lambda: 1)
    monkeypatch.setattr(worker, "_train", lambda *_: pytest.fail("trained"))
    config = worker.WorkerConfig(
        recipe=write(tmp_path).spec.model_dump(mode="json"),
        home=str(settings.home),
        base_fingerprint=get_base(settings.home, "tiny").fingerprint,
        log_level="WARNING",
        run="20260101",
        peak_tflops=None,
        events=None,
        data=None,
    )
    assert worker.run(config) == "rank 1 has no such base"
    config["base_fingerprint"] = "0" * 64
    assert "another model on this machine" in (worker.run(config) or "")


# -- following a job --------------------------------------------------------------------------------------------------


class Flaky:
    """A job server that sends one more line with each connection and then closes it."""

    def __init__(self, num_lines: int, lines_at_once: int) -> None:
        self.num_lines, self.lines_at_once, self.calls = num_lines, lines_at_once, 0

    async def follow(self, job: str) -> AsyncIterator[str]:
        self.calls += 1
        shown = min(self.num_lines, self.calls * self.lines_at_once)
        yield "".join(f"{i}\n" for i in range(shown))
        if shown < self.num_lines or not self.lines_at_once:
            raise RuntimeError("connection lost")

    def find(self, job: str) -> RayJob:
        if self.calls < 2:
            raise ClusterError("no answer")
        return RayJob("SUCCEEDED", "")


def test_a_lost_connection_is_opened_again_as_long_as_it_brings_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_RECONNECT_S", 0)
    lines: list[str] = []
    asyncio.run(command.follow(Flaky(12, 1), "job", lines.append))
    assert lines == [str(i) for i in range(12)]
    dead = Flaky(12, 0)
    with pytest.raises(LorayError, match="lost the connection"):
        asyncio.run(command.follow(dead, "job", lines.append))
    assert dead.calls == 5


def test_a_job_that_fails_fails_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Failed:
        async def follow(self, job: str) -> AsyncIterator[str]:
            yield '{"event": "error", "kind": "BaseNotFound", "message": "no base model \'missing\'"}\n'

        def find(self, job: str) -> RayJob:
            return RayJob("FAILED", "")

    monkeypatch.setattr(command, "_submit", lambda *_, **__: (Failed(), "job"))
    outcome = CliRunner().invoke(command.train, [str(write(tmp_path, base="missing").path)])
    assert outcome.exit_code == 1
    assert outcome.output.splitlines()[-1] == "error: no base model 'missing'"


def test_a_store_that_does_not_answer_is_refused_at_submission(
    tmp_path: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "local", lambda *_, **__: pytest.fail("submitted"))
    (tmp_path / "keys").write_text("[default]\naws_access_key_id = a\naws_secret_access_key = b\n")
    store = f"s3://bucket/loray?endpoint_url=http://127.0.0.1:{free_port()}&credentials_file={tmp_path}/keys"
    for name, value in (settings.to_env() | {"LORAY_STORE": store}).items():
        monkeypatch.setenv(name, value)
    outcome = CliRunner().invoke(command.train, [str(write(tmp_path).path)])
    assert isinstance(outcome.exception, StoreError)
