"""Several adapters as one job on a cluster: from the command to their versions; killed, it goes on where it was."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from jobs.command import train
from jobs.events import decode
from jobs.runs.folders import open_runs
from jobs.runs.history import RunEvents
from jobs.submission.server import RayJobServer
from jobs.submission.tracker import JobTracker
from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.recipes.many import ManyPlan, load_many
from tests.fixtures.cluster import RayCluster
from tests.fixtures.recipes import write

pytestmark = pytest.mark.cluster

NAMES = ("acme", "globex", "initech")


@pytest.fixture
def customers(tmp_path: Path, ray_cluster: RayCluster, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with data of three customers, in the cluster's environment."""
    for number, name in enumerate(NAMES):
        texts = ["".join(chr(97 + (i * (number + 1) + t) % 26) for t in range(20 + i)) for i in range(20)]
        path = tmp_path / "customers" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    for name, value in ray_cluster.settings.to_env().items():
        monkeypatch.setenv(name, value)
    return tmp_path


def recipe(folder: Path, base: BaseModel, **fields: Any) -> str:
    ours: dict[str, Any] = {"base": base.name, "dtype": "float32", "evaluation": {"interval_steps": 3}}
    return str(write(folder, **ours | fields).path)


def test_one_recipe_is_trained_on_each_file_and_published(
    ray_cluster: RayCluster, cluster_base: BaseModel, customers: Path
) -> None:
    path = recipe(customers, cluster_base, name="many", max_steps=6, publish={"aliases": ["prod"]})
    each = f"{customers}/customers/*.jsonl"
    done = CliRunner().invoke(train, [path, "--each", each, "--address", ray_cluster.address])
    assert done.exit_code == 0, done.output
    (job_id,) = re.findall(r"training 3 adapters as job (\S+)", done.output)
    assert "plan: 3 adapters together" in done.output
    catalog = Catalog(ray_cluster.settings.catalog)
    assert catalog.jobs.get(job_id).message == "3 of 3 adapters published"
    parts = catalog.jobs.parts(job_id)
    assert [(part.name, part.status, part.version) for part in parts] == [(f"many-{n}", "succeeded", 1) for n in NAMES]
    losses = set()
    for name, part in zip(NAMES, parts, strict=True):
        assert f"published many-{name}@1 (prod)" in done.output
        version = catalog.adapters.version(f"many-{name}", 1)
        assert (version.aliases, version.manifest.job_id) == (("prod",), part.id)
        before, after = version.manifest.evaluations
        assert (before.subject, after.subject) == ("base", "adapter")
        assert after.value < before.value
        losses.add(after.value)
        history = RunEvents(ray_cluster.settings, part.name, part.id, part.created_at)  # as the console reads it
        steps = [event["step"] for line in history.read().lines if (event := json.loads(line))["event"] == "step"]
        assert steps == [1, 2, 3, 4, 5, 6]
    assert len(losses) == 3
    tracker = JobTracker(lambda: catalog, RayJobServer(lambda: ray_cluster.address), ray_cluster.settings)
    told = [decode(line) for line in "".join(tracker.logs(parts[0].id)).splitlines()]
    kinds = [event["event"] for event in told if event is not None]
    assert (kinds[0], kinds[-2:], kinds.count("eval")) == ("start", ["end", "published"], 3)


@pytest.mark.slow
def test_a_killed_job_goes_on_and_a_failure_concerns_one(
    ray_cluster: RayCluster, cluster_base: BaseModel, customers: Path
) -> None:
    entries: list[dict[str, Any]] = [{"name": f"k-{n}", "data.train": f"customers/{n}.jsonl"} for n in NAMES]
    entries[1] |= {"optimizer.learning_rate": 1e36, "optimizer.schedule": "constant", "max_nonfinite_steps": 2}
    recipe(customers, cluster_base, max_steps=200, checkpoint={"interval_steps": 10})
    path = str(customers / "recipe.yaml")
    fields = yaml.safe_load(Path(path).read_text()) | {"name": "k", "adapters": entries}
    Path(path).write_text(yaml.safe_dump(fields))
    name, recipes = load_many([path])
    plan = customers / "plan.json"
    plan.write_text(ManyPlan.of(name, recipes, lambda each: str(each.folder)).model_dump_json())
    command = [sys.executable, "-m", "jobs.many.driver", str(plan), "--events"]
    with subprocess.Popen(command, env=os.environ | ray_cluster.env, stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        for line in driver.stdout:
            event: Any = decode(line)
            if event and event["event"] == "eval" and event["step"] >= 60:
                driver.send_signal(signal.SIGKILL)
                break
        driver.stdout.close()
    done = CliRunner().invoke(train, [path, "--resume", "--json", "--address", ray_cluster.address])
    assert done.exit_code == 1, done.output  # one adapter has failed
    ended = {o["name"]: o for o in json.loads(done.stdout[done.stdout.index("{\n") :])["adapters"]}
    assert [ended[f"k-{n}"]["status"] for n in NAMES] == ["succeeded", "failed", "succeeded"]
    assert "not finite" in ended["k-globex"]["message"]
    runs = open_runs(ray_cluster.settings)
    events = [json.loads(line) for line in (runs.latest("k-acme").read("events.jsonl") or b"").splitlines()]
    first, second = (event["step"] for event in events if event["event"] == "start")
    assert first == 0
    assert second >= 50
    losses: dict[int, set[float]] = {}
    for event in events:
        if event["event"] == "step":
            losses.setdefault(event["step"], set()).add(event["loss"])
    assert sorted(losses) == list(range(1, 201))
    assert all(max(same) - min(same) < 1e-4 for same in losses.values())  # of steps that were done again
