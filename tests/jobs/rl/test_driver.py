"""Reinforcement learning on the session's cluster: a short run from its recipe to a published version, refusals, and a
driver that is killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from jobs.events import Event
from jobs.rl import driver
from jobs.rl.environments import Environments, EpisodeFailed
from jobs.runs.folders import open_runs
from loray.errors import DataError, SpecError
from loray.recipes.load import Recipe, load_recipe
from loray.spec import RewardSpec, RlSpec
from tests.fixtures.cluster import RayCluster, Served

pytestmark = pytest.mark.cluster

OWN = """
import os
import time


def vowels(row, answer):
    if row["prompt"] == "hang":
        time.sleep(60)
    if row["prompt"] == "die":
        os._exit(1)
    return sum(c in "aeiou" for c in answer.lower()) / 8


class Twice:
    async def start(self, row):
        self.turns = 0
        return row["prompt"]

    async def step(self, answer):
        self.turns += 1
        return 0.5 * len(answer) % 1, self.turns == 2, "more"
"""


def recipe(folder: Path, base: str, *, steps: int = 3, **over: Any) -> Recipe:
    (folder / "own_rewards_of_rl.py").write_text(OWN)
    rows = "".join(f"{json.dumps({'prompt': f'say {c}', 'answer': c})}\n" for c in "abcdefgh")
    (folder / "rows.jsonl").write_text(rows)
    objective = {
        "type": "rl",
        "reward": {"function": "own_rewards_of_rl:vowels"},
        "group_size": 4,
        "prompts_per_step": 2,
        "max_tokens": 6,
    }
    fields = {
        "name": f"rl-{folder.name}",
        "base": base,
        "objective": objective | over.pop("objective", {}),
        "adapter": {"method": "lora", "rank": 4, "target_modules": ["q_proj", "v_proj"]},
        "data": {"train": str(folder / "rows.jsonl"), "eval_fraction": 0.25},
        "optimizer": {"learning_rate": 0.01},
        "max_steps": steps,
        "dtype": "float32",
        "tracking": ["tensorboard"],
    }
    (folder / "recipe.json").write_text(json.dumps(fields | over))
    return load_recipe(str(folder / "recipe.json"))


def test_a_run_from_its_recipe_to_its_version(ray_cluster: RayCluster, served: Served, tmp_path: Path) -> None:
    told: list[Event] = []
    made = recipe(tmp_path, served.base.name)
    driver.train(made, ray_cluster.settings, told.append)
    events: list[dict[str, Any]] = [dict(event) for event in told]
    rollouts = [event for event in events if event["event"] == "rollout"]
    assert [event["step"] for event in rollouts] == [1, 2, 3]
    for event in rollouts:
        if event["metrics"]["groups_kept"]:
            assert event["metrics"]["mismatch_max"] < 1e-4
        assert len(event["samples"]) == 5
    assert [event["step"] for event in events if event["event"] == "eval"] == [0, 3]
    published = events[-1]
    assert published["event"] == "published"
    digests = {event["digest"] for event in rollouts}
    assert published["digest"] in digests  # under which it was sampled
    assert served.catalog.adapters.resolve(published["label"]).digest == published["digest"]
    (job,) = [job for job in served.catalog.jobs.page().items if job.name == made.spec.name]
    assert (job.status, job.version) == ("succeeded", 1)
    again: list[Event] = []
    driver.train(made, ray_cluster.settings, again.append, resume=True)  # there is nothing left to do
    assert dict(again[-1]) == published


def test_what_a_run_needs(ray_cluster: RayCluster, served: Served, tmp_path: Path) -> None:
    settings = ray_cluster.settings
    with pytest.raises(SpecError, match="own_rewards_of_rl:missing cannot be imported"):
        driver.train(
            recipe(tmp_path, served.base.name, objective={"reward": {"function": "own_rewards_of_rl:missing"}}),
            settings,
            lambda event: None,
        )
    reward = {"reward": {"builtin": "exact", "field": "right"}}
    with pytest.raises(DataError, match=r"rows.jsonl, line 1: the row has no `right`, which the reward reads"):
        driver.train(recipe(tmp_path, served.base.name, objective=reward), settings, lambda event: None)
    with pytest.raises(SpecError, match="code of the recipe"):
        driver.train(recipe(tmp_path, served.base.name), settings, lambda event: None, tenant="acme")


@pytest.mark.slow
def test_rewards_that_hang_and_die(ray_cluster: RayCluster, tmp_path: Path) -> None:
    (tmp_path / "own_rewards_of_rl.py").write_text(OWN)
    spec = RlSpec(reward=RewardSpec(function="own_rewards_of_rl:vowels"), timeout_s=2.0)
    environments = Environments(spec, [str(tmp_path)])

    async def ask() -> None:
        assert await environments.reward({"prompt": ""}, "aeio") == 0.5
        with pytest.raises(EpisodeFailed, match=r"more than objective.timeout_s \(2 s\)"):
            await environments.reward({"prompt": "hang"}, "a")
        # A busy machine may not notice that a process has died before its time is over.
        with pytest.raises(EpisodeFailed, match=r"its process died|took more than objective.timeout_s"):
            await environments.reward({"prompt": "die"}, "a")
        with pytest.raises(EpisodeFailed, match="KeyError"):
            await environments.reward({}, "a")
        assert await environments.reward({"prompt": ""}, "aeio") == 0.5

    try:
        asyncio.run(ask())
    finally:
        environments.close()


def test_an_environment_has_turns(ray_cluster: RayCluster, tmp_path: Path) -> None:
    (tmp_path / "own_rewards_of_rl.py").write_text(OWN)
    environments = Environments(RlSpec(environment="own_rewards_of_rl:Twice"), [str(tmp_path)])

    async def play() -> None:
        place, said = await environments.start("1", {"prompt": "begin"})
        assert said == "begin"
        assert await environments.step(place, "abc") == (0.5, False, "more")
        assert (await environments.step(place, "ab")).done

    try:
        asyncio.run(play())
    finally:
        environments.close()


@pytest.mark.slow
def test_a_killed_driver_goes_on(ray_cluster: RayCluster, served: Served, tmp_path: Path) -> None:
    made = recipe(tmp_path, served.base.name, steps=12, evaluation={"interval_steps": 4})
    command = [sys.executable, "-m", "jobs.rl.driver", str(tmp_path / "recipe.json"), "--events"]
    environment = os.environ | ray_cluster.env
    for kill in range(3):
        again = [*command, *(["--resume"] if kill else [])]
        with subprocess.Popen(again, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if '"rollout"' in line and json.loads(line)["step"] >= 3 * (kill + 1):
                    break
            time.sleep(0.05 * kill)  # in the midst of another step
            process.send_signal(signal.SIGKILL)
    done = subprocess.run([*command, "--resume"], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    assert '"published"' in done.stdout
    run = open_runs(ray_cluster.settings).latest(made.spec.name)
    events = [json.loads(line) for line in (run.read("events.jsonl") or b"").splitlines()]
    steps = Counter(event["step"] for event in events if event["event"] == "rollout")
    assert steps == dict.fromkeys(range(1, 13), 1)
    last = [event for event in events if event["event"] == "rollout"][-1]
    assert last["version"] == sum(e["metrics"]["groups_kept"] > 0 for e in events if e["event"] == "rollout")
