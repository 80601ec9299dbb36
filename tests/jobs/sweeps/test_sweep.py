"""A sweep on a real cluster: killed in the middle it goes on where it was, and publishes the best of six trials."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from jobs.events.messages import decode
from jobs.runs.folders import open_runs
from jobs.sweeps.axes import grid_axis, points
from jobs.sweeps.trials import SweepPlan, expand
from loray.bases.registry import add_base
from loray.catalog import Catalog
from loray.recipes.load import load_recipe
from tests.cluster import RayCluster
from tests.test_recipe import write
from tests.tiny import write_checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_a_killed_sweep_goes_on_and_publishes_the_best_trial(
    ray_cluster: RayCluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
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

    events: list[Any] = []
    published = sweep("swept", ray_cluster.settings, events.append)
    ended = {e["trial"]: e for e in events if e["event"] == "trial" and e["status"] != "running"}
    assert sorted(ended) == list(range(6))
    statuses = [ended[i]["status"] for i in range(6)]
    assert set(statuses) <= {"completed", "stopped"}
    assert [list(pair) for pair in ended[first]["losses"]] == seen[-1]["losses"]

    (told,) = (e for e in events if e["event"] == "sweep")
    runs = open_runs(ray_cluster.settings, "sweeps")
    folder = runs.latest("swept")
    assert told["folder"] == str(folder)
    assert (folder.read("trials.svg") or b"").startswith(b"<svg")
    finished = folder.read(f"{folder.name}-{first:04}/events.jsonl") or b""
    assert finished.count(b'"event": "start"') == 1  # not trained again

    losses = {i: min(loss for _, loss in ended[i]["losses"]) for i in range(6) if statuses[i] == "completed"}
    assert told["best"] == min(losses, key=lambda i: losses[i])
    version = Catalog(ray_cluster.settings.catalog).adapter("swept").versions[-1]
    assert (version.label, version.digest) == (published["label"], published["digest"])
    assert version.manifest.sweep == f"swept/{folder.name}, trial {told['best']} of 6"
    assert version.manifest.recipe is not None
    best = trials[told["best"]].recipe
    assert version.manifest.recipe.optimizer == best.optimizer
    assert version.manifest.recipe.adapter == best.adapter
    assert version.manifest.evaluations[-1].value == pytest.approx(losses[told["best"]])

    again: list[Any] = []
    assert sweep("swept", ray_cluster.settings, again.append) == published  # nothing is left to train
