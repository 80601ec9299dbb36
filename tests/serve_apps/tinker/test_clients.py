"""Tinker's SDK and the cookbook's loops, unmodified, against `loray up` on the real base in float32."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any

import httpx
import numpy as np
import pytest

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.local.cluster import current_cluster
from loray.local.processes import session_members
from tests.faults.world import command_line
from tests.fixtures.asking import eventually
from tests.fixtures.cluster import free_port
from tests.serve_apps.tinker.cookbook import MODEL, write_working_directory
from tests.serve_apps.tinker.environments import COOKBOOK, LATER_COOKBOOK, client_environment, python_with, run_client

pytestmark = pytest.mark.slow

LOOP = Path(__file__).parent / "clients" / "loop.py"
STEPS = LOOP.with_name("steps.py")
TITLES = (
    "ray::Trainer",
    "ray::ServeReplica:tinker:front",
    "ray::ServeReplica:loray:engine-smollm2",
    "ray::ServeReplica:loray:gateway",
)
_GROUPS = {"group_size": 8, "max_tokens": 48}
LOOPS: list[tuple[str, str | None, dict[str, Any]]] = [
    ("sl_loop", None, {}),
    ("rl_loop", None, _GROUPS),
    ("rl_loop", LATER_COOKBOOK, _GROUPS | {"loss_fn": "importance_sampling"}),
]


@dataclass
class Deployment:
    url: str
    folder: Path
    home: Path
    base: BaseModel

    def process(self, title: str) -> int:
        """The process of the cluster whose title begins so, once there is one."""
        cluster = current_cluster(self.home)
        assert cluster is not None
        found: list[int] = []

        def is_there() -> bool:
            found[:] = [pid for pid in session_members(cluster.pid) if command_line(pid).startswith(title)]
            return bool(found)

        assert eventually(is_there, timeout_s=60), title
        return found[0]

    def answers(self, model: str) -> bool:
        body = {"model": model, "max_tokens": 2, "messages": [{"role": "user", "content": "Hello"}]}
        response = httpx.post(f"{self.url}/v1/chat/completions", json=body, timeout=120)
        return response.status_code == 200


@pytest.fixture(scope="module")
def deployment(smollm2: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("tinker")
    home, port = folder / "home", free_port()
    (home / "bases").mkdir(parents=True)
    (home / "bases" / "smollm2").symlink_to(smollm2.path)
    spec = folder / "spec.yaml"
    spec.write_text(f"{{base: smollm2, port: {port}, dtype: float32, max_num_seqs: 16}}\n")
    env = os.environ | {"LORAY_HOME": str(home), "LORAY_TINKER_NAMES": json.dumps({MODEL: "smollm2"})}
    for name in ("RAY_ADDRESS", "LORAY_STORE", "LORAY_CATALOG", "LORAY_ADDRESS"):
        env.pop(name, None)
    loray = [sys.executable, "-m", "loray.cli.main"]
    subprocess.run([*loray, "up", "--spec", str(spec)], env=env, check=True, timeout=300)
    try:
        write_working_directory(folder, smollm2)
        yield Deployment(f"http://127.0.0.1:{port}", folder, home, smollm2)
    finally:
        subprocess.run([*loray, "down"], env=env, check=True, timeout=120)


@pytest.mark.parametrize("version", ["0.38.0", "0.25.0"])
def test_the_sdk_trains_goes_on_and_samples(deployment: Deployment, version: str) -> None:
    python = python_with(f"tinker=={version}")
    told = run_client(python, str(LOOP), f"{deployment.url}/tinker", "smollm2", folder=deployment.folder)
    assert told.returncode == 0, told.stderr
    seen = json.loads(told.stdout.splitlines()[-1])
    assert seen["losses"][-1] < 0.5 * seen["losses"][0]
    np.testing.assert_allclose(seen["after"], seen["before"], atol=1e-5)
    np.testing.assert_allclose(seen["scored"], seen["after"], atol=1e-4)
    assert len(seen["sampled"]) == 4
    assert deployment.answers(f"spoken-{version.replace('.', '-')}@1")


@pytest.mark.parametrize(("loop", "cookbook", "options"), LOOPS, ids=["sl_loop", "rl_loop", "rl_loop of 0.6.1"])
def test_the_cookbooks_loops_run_and_go_on(
    deployment: Deployment, tmp_path: Path, loop: str, cookbook: str | None, options: dict[str, Any]
) -> None:
    log = tmp_path / loop
    given = {
        "base_url": f"{deployment.url}/tinker",
        "model_name": MODEL,
        "batch_size": 8,
        "lora_rank": 8,
        **options,
    }
    python = python_with(*COOKBOOK, without_dependencies=cookbook)

    def run(**more: Any) -> str:
        told_of = given | {"log_path": log, "save_every": 2} | more
        arguments = [f"{name}={value}" for name, value in told_of.items()]
        told = run_client(python, "-m", f"tinker_cookbook.recipes.{loop}", *arguments, folder=deployment.folder)
        assert told.returncode == 0, told.stdout[-4000:] + told.stderr[-4000:]
        return told.stdout + told.stderr

    run(max_steps=5)
    metrics = [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]
    assert len(metrics) == 5
    if loop == "sl_loop":
        assert metrics[-1]["train_mean_nll"] < metrics[0]["train_mean_nll"]
    checkpoints = log / "checkpoints.jsonl"
    rows = [json.loads(line) for line in checkpoints.read_text().splitlines()]
    session, model = rows[-1]["sampler_path"].removeprefix("tinker://").split("/")[0].split(":train:")
    assert deployment.answers(f"tinker-{session.removeprefix('session-')}-{model}@1")
    checkpoints.write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))  # cut off before the end
    assert "Resuming from batch 4" in run(max_steps=5)


def test_sixty_steps_whatever_is_killed(deployment: Deployment) -> None:
    """Trainer, front, engine and gateway: ten of them, each at least twice, in drawn steps and at drawn moments."""
    draw = np.random.default_rng(0)
    victims = draw.permutation([*TITLES, *TITLES, *draw.choice(TITLES, 2)]).tolist()
    steps = draw.choice(60, len(victims), replace=False).tolist()
    python = python_with("tinker==0.38.0")
    command = [python, "-W", "ignore", str(STEPS), f"{deployment.url}/tinker", "smollm2", "60"]
    client = subprocess.Popen(
        command, cwd=deployment.folder, env=client_environment(), stdout=subprocess.PIPE, text=True
    )
    killed: list[str] = []

    def kill() -> None:
        killed.append(victims[len(killed)])
        os.kill(deployment.process(killed[-1]), signal.SIGKILL)

    assert client.stdout is not None
    with client, ThreadPoolExecutor(1) as one_after_the_other:
        kills = []
        for line in client.stdout:
            told = json.loads(line)
            if told.get("step") in steps:
                Timer(draw.uniform(0.0, 0.5), lambda: kills.append(one_after_the_other.submit(kill))).start()
    assert client.returncode == 0
    for each in kills:
        each.result()
    assert len(killed) == len(victims)
    run = httpx.get(f"{deployment.url}/tinker/api/v1/training_runs/{told['model']}", timeout=60)
    assert run.status_code == 200
    assert eventually(lambda: _steps_of(deployment, told["model"]) == 60, timeout_s=90)
    losses = told["losses"]
    assert losses[-1] < 0.5 * losses[0]
    assert max(np.diff(losses)) < 1.0  # no step is done twice, none is lost


def _steps_of(deployment: Deployment, model: str) -> int:
    catalog = Catalog(f"sqlite:///{deployment.home}/catalog.db")
    try:
        return catalog.tinker.model(model).num_steps
    finally:
        catalog.close()
