"""Runs on machines that share a bucket and a database: with two workers, killed workers and drivers, and stops."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs.events import decode
from jobs.runs import leases
from jobs.runs.folders import open_runs
from loray.adapters.peft_format import WEIGHTS_FILE, read_adapter
from loray.bases.registry import BaseModel, add_base
from loray.catalog import AdapterVersion, Catalog
from loray.recipes.load import Recipe
from loray.settings import Settings
from loray.store import AdapterStore, open_filesystem, open_store
from loray.train.checkpoint import read_state
from tests.fixtures.cluster import NUM_CPUS, RayCluster
from tests.fixtures.postgres import Postgres
from tests.fixtures.recipes import write
from tests.fixtures.runs import follow, run
from tests.fixtures.s3 import S3Server
from tests.fixtures.tiny import write_checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

TINY = "tiny-shared"
FIELDS: dict[str, Any] = {
    "base": TINY,
    "dtype": "float32",
    "num_workers": 2,
    "max_steps": 30,
    "evaluation": {"interval_steps": 10},
    "publish": {"aliases": ["prod"]},
}


@pytest.fixture(scope="module")
def base(ray_cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), std=0.05)
    return add_base(str(checkpoint), home=ray_cluster.home, name=TINY)


@pytest.fixture(scope="module")
def settings(ray_cluster: RayCluster, s3_server: S3Server, postgres: Postgres) -> Settings:
    shared = {"LORAY_STORE": s3_server.url("cluster", prefix="loray"), "LORAY_CATALOG": postgres.new_database()}
    return Settings.from_env(ray_cluster.settings.to_env() | shared)


def recipe_in_bucket(folder: Path, settings: Settings, **fields: Any) -> Recipe:
    """A recipe with its data in the store's bucket."""
    recipe = write(folder, **FIELDS | fields)
    files, root = open_filesystem(settings.store)
    bucket = root.split("/")[0]
    with files.open_output_stream(f"{bucket}/data/train.jsonl") as file:
        file.write((folder / "data.jsonl").read_bytes())
    (folder / "data.jsonl").unlink()
    data = recipe.spec.data.model_copy(update={"train": f"s3://{bucket}/data/train.jsonl"})
    return recipe._replace(spec=recipe.spec.model_copy(update={"data": data}))


def objects(settings: Settings, name: str) -> list[str]:
    """Keys of the objects in the run's folder."""
    prefix = f"runs/{name}/"
    return [key.removeprefix(prefix).partition("/")[2] for key in open_store(settings.store).list(prefix)]


@pytest.fixture(scope="module")
def undisturbed(base: BaseModel, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The events of a run without failures."""
    return run(recipe_in_bucket(tmp_path_factory.mktemp("undisturbed"), settings, name="undisturbed"), settings)


def losses(events: list[dict[str, Any]]) -> list[float]:
    """The loss of each step; of a repeated step, the last one."""
    found = {e["step"]: e["loss"] for e in events if e["event"] == "step"}
    return [found[step] for step in sorted(found)]


def version_of(settings: Settings, name: str) -> AdapterVersion:
    assert list(Catalog(settings.catalog).adapters.get(name).versions) == [1]
    return Catalog(settings.catalog).adapters.version(name, 1)


def kill_at_the_first_checkpoint(before: Callable[[], object] = lambda: None) -> Callable[..., None]:
    killed: list[int] = []

    def kill_once(event: dict[str, Any], seen: list[dict[str, Any]]) -> None:
        if event["event"] == "checkpoint" and not killed:
            killed.append(next(e["pid"] for e in seen if e["event"] == "start"))
            before()
            os.kill(killed[0], signal.SIGKILL)

    return kill_once


def test_two_workers_train_into_the_bucket_and_one_may_die(
    ray_cluster: RayCluster, base: BaseModel, settings: Settings, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    recipe = recipe_in_bucket(tmp_path, settings, name="shared")
    events = run(recipe, settings, kill_at_the_first_checkpoint())
    assert [e["event"] for e in events].count("worker_lost") == 1
    first, second = (e for e in events if e["event"] == "start")
    assert (first["step"], first["num_workers"]) == (0, 2)
    assert second["step"] >= 10
    found = open_runs(settings).latest("shared")
    (saved,) = {e["path"] for e in events if e["event"] == "checkpoint" and e["step"] == 30}
    assert saved == f"{found}/step_000030"

    published, version = events[-1], version_of(settings, "shared")
    assert losses(events) == losses(undisturbed)
    assert version.manifest.files == version_of(settings, "undisturbed").manifest.files  # bit for bit
    assert (version.digest, version.aliases) == (published["digest"], ("prod",))
    (job,) = Catalog(settings.catalog).jobs.page(name="shared").items
    assert (job.status, job.version, job.id) == ("succeeded", 1, version.manifest.job_id)
    assert job.recipe == recipe.spec
    AdapterStore(open_store(settings.store)).fetch(version.digest, tmp_path / "fetched")
    assert len(read_adapter(tmp_path / "fetched", base.config).modules) == 14

    keys = objects(settings, "shared")
    assert "step_000030/state.json" in keys
    assert len({key.split("/")[0] for key in keys if key.startswith("step_")}) == 2  # checkpoint.keep
    history = [event for line in (found.read("events.jsonl") or b"").decode().splitlines() if (event := decode(line))]
    assert history == events[:-1]
    assert not list(ray_cluster.home.glob("runs/shared/*/step_*"))
    assert run(recipe, settings, resume=True) == [published]


@contextmanager
def room_for_one() -> Iterator[Callable[[], None]]:
    """Another job reserves all CPUs but one. Yields a function that frees them."""
    import ray
    from ray.data._internal.cluster_autoscaler.base_autoscaling_coordinator import ResourceRequestPriority
    from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
        get_or_create_autoscaling_coordinator,
    )

    coordinator = get_or_create_autoscaling_coordinator()
    ray.get(
        coordinator.request_resources.remote(
            requester_id="another job",
            resources=[{"CPU": 1}] * (NUM_CPUS - 1),
            expire_after_s=600,
            priority=ResourceRequestPriority.HIGH,
        )
    )

    def give_back() -> None:
        ray.get(coordinator.cancel_request.remote(requester_id="another job"))

    try:
        yield give_back
    finally:
        give_back()


def test_a_run_takes_the_same_steps_after_its_number_of_workers_changes(
    ray_cluster: RayCluster, base: BaseModel, settings: Settings, undisturbed: list[dict[str, Any]], tmp_path: Path
) -> None:
    recipe = recipe_in_bucket(tmp_path, settings, name="elastic", min_workers=1)
    with room_for_one() as give_back:
        events = run(recipe, settings, kill_at_the_first_checkpoint(give_back))
    assert [e["num_workers"] for e in events if e["event"] == "start"] == [1, 2]
    assert losses(events) == pytest.approx(losses(undisturbed), rel=1e-4)
    tensors = []
    for name in ("elastic", "undisturbed"):
        AdapterStore(open_store(settings.store)).fetch(version_of(settings, name).digest, tmp_path / name)
        tensors.append(load_file(tmp_path / name / WEIGHTS_FILE))
    torch.testing.assert_close(*tensors, rtol=1e-3, atol=1e-4)


def test_another_machine_resumes_the_run_of_a_killed_driver(
    ray_cluster: RayCluster, base: BaseModel, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_in_bucket(tmp_path, settings, name="orphan", num_workers=1, max_steps=4000)
    driver = subprocess.Popen(
        [sys.executable, "-m", "jobs.train", recipe.spec.model_dump_json(exclude_none=True), "--events"],
        env=os.environ | ray_cluster.env | settings.to_env() | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert driver.stdout is not None
    checkpoints = (e for line in driver.stdout if (e := decode(line)) and e["event"] in ("checkpoint", "error"))
    assert next(checkpoints)["event"] == "checkpoint"
    driver.kill()
    driver.wait()
    driver.stdout.close()

    elsewhere = Settings.from_env(settings.to_env() | {"LORAY_HOME": str(tmp_path / "home")})
    add_base(str(base.path), home=elsewhere.home, name=TINY)
    monkeypatch.setattr(leases, "STALE_S", 2.0)  # the driver is dead, so its lease becomes stale
    with open_runs(settings).latest("orphan").result().checkpoint.as_directory() as checkpoint:
        left_at = read_state(Path(checkpoint)).step
    changes = {
        "max_steps": left_at + 300,
        "evaluation": recipe.spec.evaluation.model_copy(update={"interval_steps": 999}),
    }
    events = run(recipe._replace(spec=recipe.spec.model_copy(update=changes)), elsewhere, resume=True)
    (start,) = (e for e in events if e["event"] == "start")
    assert start["step"] >= left_at >= 10
    assert events[-1]["event"] == "published"
    assert list(Catalog(settings.catalog).adapters.get("orphan").versions) == [1]
    version = Catalog(settings.catalog).adapters.version("orphan", 1)
    ended, orphaned = Catalog(settings.catalog).jobs.page(name="orphan").items
    assert version.manifest.job_id == orphaned.id
    assert (ended.status, ended.version, orphaned.status) == ("succeeded", 1, "running")


def test_a_stopped_job_is_recorded_and_releases_its_run(
    ray_cluster: RayCluster, base: BaseModel, settings: Settings, tmp_path: Path
) -> None:
    from ray.job_submission import JobStatus, JobSubmissionClient

    from jobs.submission.commands import Place, Submission, Work

    recipe = recipe_in_bucket(tmp_path, settings, name="stopped", num_workers=1, max_steps=4000)
    client, catalog = JobSubmissionClient(ray_cluster.address), Catalog(settings.catalog)
    submission = Submission.of(Work.training(recipe), Place.of_server(settings, tmp_path))
    job = client.submit_job(**submission._asdict())

    def has_told_of_a_checkpoint() -> bool:
        lines = client.get_job_logs(job).splitlines()
        return any((decode(line) or {}).get("event") == "checkpoint" for line in lines)

    until(has_told_of_a_checkpoint, lambda: client.get_job_logs(job))
    assert any(key.endswith("/state.json") for key in objects(settings, "stopped"))
    assert catalog.jobs.get(job).status == "running"
    client.stop_job(job)
    until(lambda: client.get_job_status(job) == JobStatus.STOPPED, lambda: client.get_job_logs(job))
    assert catalog.jobs.get(job).status == "stopped", client.get_job_logs(job)[-2000:]
    found = open_runs(settings).latest("stopped")
    assert found.job_id == job
    store = open_store(settings.store)
    newest = max(store.list(f"runs/stopped/{found.path.rpartition('/')[2]}/lock/"))
    assert json.loads(store.get(newest))["holder"] is None  # released
    with found.locked("next", pytest.fail):
        pass
    assert b'"checkpoint"' in (found.read("events.jsonl") or b"")
    assert any((decode(line) or {}).get("kind") == "Interrupted" for line in follow(client, job))


def until(condition: Callable[[], bool], state: Callable[[], str]) -> None:
    deadline = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < deadline, state()
        time.sleep(0.2)
