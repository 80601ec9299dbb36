"""A sweep on a real cluster: killed in the middle it goes on where it was, and publishes the best of six trials."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobs.events import decode
from jobs.runs.folders import open_runs
from jobs.sweeps.command import sweep as sweep_command
from jobs.sweeps.spec import SweepPlan, expand, grid_axis, points
from loray.bases.registry import add_base
from loray.catalog import Catalog
from loray.recipes.load import load_recipe
from tests.fixtures.cluster import RayCluster
from tests.fixtures.recipes import write
from tests.fixtures.tiny import write_checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_a_killed_sweep_goes_on_and_publishes_the_best_trial(
    ray_cluster: RayCluster,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from jobs.sweeps.driver import sweep

    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), std=0.05)
    add_base(str(checkpoint), home=ray_cluster.home, name="tiny-swept")
    recipe = write(
        tmp_path, name="swept", base="tiny-swept", dtype="float32", max_steps=18, evaluation={"interval_steps": 2}
    )
    grid = [grid_axis("optimizer.learning_rate=1e-2,1e-5,3e-3"), grid_axis("adapter.method=lora,vera")]
    trials = expand(points(grid, [], None, seed=0), lambda over: load_recipe(str(recipe.path), over=over).spec)
    plan = SweepPlan(recipe=recipe.spec, folder=str(tmp_path), trials=trials, max_concurrent=2)
    (tmp_path / "plan.json").write_text(plan.model_dump_json())

    command = [sys.executable, "-m", "jobs.sweeps.driver", str(tmp_path / "plan.json"), "--events"]
    with subprocess.Popen(
        command, env=os.environ | ray_cluster.env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as driver:
        seen: list[Any] = []
        lines: list[str] = []
        assert driver.stdout is not None
        for line in driver.stdout:
            lines.append(line)
            if event := decode(line):
                seen.append(event)
                if event["event"] == "trial" and event["status"] == "completed":
                    driver.send_signal(signal.SIGKILL)
                    break
        driver.stdout.close()
    assert seen, "".join(lines)
    assert seen[-1]["status"] == "completed", "".join(lines)
    first = seen[-1]["trial"]

    for name, value in ray_cluster.settings.to_env().items():
        monkeypatch.setenv(name, value)
    picture = tmp_path / "losses.svg"
    arguments = ["--resume", "swept", "--address", ray_cluster.address, "--json", "--picture", str(picture)]
    result = CliRunner().invoke(sweep_command, arguments)
    assert result.exit_code == 0, result.output
    published = json.loads(result.stdout[result.stdout.index("{\n") :])  # Ray may warn this process, a driver too
    ended = published["trials"]
    assert [trial["trial"] for trial in ended] == list(range(6))
    assert {trial["status"] for trial in ended} <= {"completed", "stopped"}
    assert ended[first]["losses"] == seen[-1]["losses"]

    folder = open_runs(ray_cluster.settings, "sweeps").latest("swept")
    assert published["folder"] == str(folder)
    assert picture.read_bytes() == folder.read("trials.svg")
    finished = folder.read(f"{folder.name}-{first:04}/events.jsonl") or b""
    assert finished.count(b'"event": "start"') == 1  # not trained again

    losses = {trial["trial"]: trial["loss"] for trial in ended if trial["status"] == "completed"}
    assert published["best"] == min(losses, key=lambda i: losses[i])
    catalog = Catalog(ray_cluster.settings.catalog)
    version = catalog.adapters.version("swept", 1)
    assert (version.label, version.digest) == (published["label"], published["digest"])
    assert catalog.jobs.get(published["job_id"]).version == version.version
    assert version.manifest.sweep == f"swept/{folder.name}, trial {published['best']} of 6"
    assert version.manifest.recipe is not None
    best = trials[published["best"]].recipe
    assert version.manifest.recipe.optimizer == best.optimizer
    assert version.manifest.recipe.adapter == best.adapter
    assert version.manifest.evaluations[-1].value == pytest.approx(losses[published["best"]])

    again: list[Any] = []
    assert sweep("swept", ray_cluster.settings, again.append)["digest"] == version.digest  # nothing is left to train
    assert len(catalog.adapters.get("swept").versions) == 1
