"""The driver on a real cluster: a submitted job publishes, a killed worker is replaced, a failed run is discarded."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobs.events import decode
from loray.adapters.peft_format import read_adapter
from loray.bases.registry import BaseModel, add_base
from loray.catalog import Catalog
from loray.errors import AdapterNotFound, DataError, LorayError, SpecError, TrainingError
from loray.store import AdapterStore, open_store
from tests.fixtures.cluster import RayCluster
from tests.fixtures.recipes import write
from tests.fixtures.runs import run, train_here
from tests.fixtures.tiny import write_checkpoint
from tests.fixtures.trained import Trained

pytestmark = pytest.mark.cluster

TINY = "tiny-trained"
FIELDS: dict[str, Any] = {
    "base": TINY,
    "dtype": "float32",
    "max_steps": 6,
    "evaluation": {"interval_steps": 2},
    "publish": {"aliases": ["prod"], "licence": "CC0-1.0"},
}


@pytest.fixture(scope="module")
def base(ray_cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), std=0.05)
    return add_base(str(checkpoint), home=ray_cluster.home, name=TINY)


def test_a_submitted_job_trains_and_publishes(
    ray_cluster: RayCluster, cluster_base: BaseModel, command_job: Trained, tmp_path: Path
) -> None:
    events = command_job.events
    kinds = [e["event"] for e in events if e["event"] not in ("step", "checkpoint")]
    assert kinds == ["start", *["eval"] * 4, "published"], "\n".join(command_job.log)
    assert [e["step"] for e in events if e["event"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert events[0]["num_threads"] == 1  # as the cluster's environment says
    # Checkpoints are reported when they are uploaded, while training continues.
    saved = [e for e in events if e["event"] == "checkpoint"]
    assert [(e["step"], e["eval_loss"]) for e in saved] == [
        (e["step"], e["eval_loss"]) for e in events if e["event"] == "eval" and e["step"]
    ]

    published, job_id = events[-1], command_job.job_id
    catalog = Catalog(ray_cluster.settings.catalog)
    assert list(catalog.adapters.get("submitted").versions) == [1]
    version = catalog.adapters.version("submitted", 1)
    assert (catalog.jobs.get(job_id).status, catalog.jobs.get(job_id).version) == ("succeeded", version.version)
    assert (version.label, version.digest, version.aliases) == (published["label"], published["digest"], ("prod",))
    assert version.manifest.job_id == job_id
    assert version.manifest.recipe is not None
    assert version.manifest.recipe.data.train == "data.jsonl"
    assert version.manifest.licence == "CC0-1.0"
    before, after = version.manifest.evaluations
    assert (before.subject, after.subject) == ("base", "adapter")
    assert after.value == min(e["eval_loss"] for e in events if e["event"] == "eval" and e["step"])
    assert after.value < before.value
    store = AdapterStore(open_store(ray_cluster.settings.store))
    store.fetch(version.digest, tmp_path / "fetched")
    assert len(read_adapter(tmp_path / "fetched", cluster_base.config).modules) == 6


def test_the_command_follows_a_job_to_its_end(command_job: Trained) -> None:
    assert "published submitted@1 (prod)" in command_job.output
    assert "ask it      loray chat submitted@1" in command_job.output
    stages = ["checking the recipe", "reading the data", "starting the workers", "loading the base", "publishing"]
    assert [stage for stage in command_job.stages if stage in stages] == stages
    assert all(stage in command_job.output for stage in stages)


def test_a_published_run_has_nothing_left_to_do(ray_cluster: RayCluster, command_job: Trained) -> None:
    assert run(command_job.recipe, ray_cluster.settings, resume=True) == command_job.events[-1:]


@pytest.mark.slow
def test_a_killed_worker_resumes_and_gives_the_same_adapter(
    ray_cluster: RayCluster, base: BaseModel, tmp_path: Path
) -> None:
    """A longer recipe then resumes the run after its end, past checkpoints without an evaluation."""
    fields = FIELDS | {"max_steps": 40, "evaluation": {"interval_steps": 10}, "checkpoint": {"interval_steps": 5}}
    unbroken = train_here(write(tmp_path, name="unbroken", **fields), ray_cluster.settings, tmp_path)
    killed: list[int] = []

    def kill_once(event: dict[str, Any], seen: list[dict[str, Any]]) -> None:
        if event["event"] == "checkpoint" and not killed:
            killed.append(next(e["pid"] for e in seen if e["event"] == "start"))
            os.kill(killed[0], signal.SIGKILL)

    broken = run(write(tmp_path, name="broken", **fields), ray_cluster.settings, kill_once)
    assert [e["event"] for e in broken].count("worker_lost") == 1
    first, second = (e for e in broken if e["event"] == "start")
    assert first["step"] == 0
    assert second["step"] >= 5
    losses = [{e["step"]: e["loss"] for e in events if e["event"] == "step"} for events in (unbroken, broken)]
    assert losses[0] == losses[1]
    catalog = Catalog(ray_cluster.settings.catalog)
    files = [catalog.adapters.version(name, 1).manifest.files for name in ("unbroken", "broken")]
    assert files[0] == files[1]

    assert run(write(tmp_path, name="broken", **fields), ray_cluster.settings, resume=True) == broken[-1:]
    assert len(catalog.adapters.get("broken").versions) == 1

    saved = {e["step"]: e["eval_loss"] for e in broken if e["event"] == "checkpoint"}
    assert saved[35] is None
    assert saved[40] is not None
    longer = run(write(tmp_path, name="broken", **fields | {"max_steps": 42}), ray_cluster.settings, resume=True)
    assert [e["step"] for e in longer if e["event"] == "start"] == [40]
    assert [e["label"] for e in (broken[-1], longer[-1])] == ["broken@1", "broken@2"]


def test_a_diverging_run_publishes_nothing(ray_cluster: RayCluster, base: BaseModel, tmp_path: Path) -> None:
    optimizer = {"learning_rate": 1e36, "schedule": "constant"}
    recipe = write(tmp_path, name="diverging", **FIELDS | {"optimizer": optimizer, "max_nonfinite_steps": 2})
    with pytest.raises(TrainingError, match=r"stopped at step \d: 2 steps .* not finite"):
        run(recipe, ray_cluster.settings)
    with pytest.raises(AdapterNotFound):
        Catalog(ray_cluster.settings.catalog).adapters.get("diverging")
    (job,) = Catalog(ray_cluster.settings.catalog).jobs.page(name="diverging").items
    assert (job.status, job.version) == ("failed", None)
    assert "not finite" in job.message


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"name": TINY}, LorayError),
        ({"data": {"train": "none.jsonl"}}, DataError),
        ({"num_workers": 99}, SpecError),
    ],
)
def test_bad_recipes_start_nothing(
    ray_cluster: RayCluster, base: BaseModel, tmp_path: Path, fields: dict[str, Any], error: Any
) -> None:
    with pytest.raises(error):
        run(write(tmp_path, **FIELDS | fields), ray_cluster.settings)


def test_the_driver_says_why_in_one_line(
    ray_cluster: RayCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from jobs.train import main

    monkeypatch.setenv("LORAY_HOME", str(ray_cluster.home))
    write(tmp_path, base="missing")
    result = CliRunner().invoke(main, [str(tmp_path / "recipe.yaml")])
    assert result.exit_code == 1
    *stages, line = result.stdout.splitlines()
    assert stages == ["checking the recipe"]
    assert line.startswith("error: no base model 'missing'")
    write(tmp_path, name="never-trained")
    nothing = CliRunner().invoke(main, [str(tmp_path / "recipe.yaml"), "--publish-checkpoint", "--events"])
    assert (decode(nothing.stdout.strip()) or {}).get("kind") == "SpecError"
