"""Tinker's SDK and the cookbook's loops, unmodified, against `loray up` on the real base in float32."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from loray.bases.registry import BaseModel
from tests.fixtures.cluster import free_port
from tests.serve_apps.tinker.cookbook import MODEL, write_working_directory
from tests.serve_apps.tinker.environments import COOKBOOK, python_with, run_client

pytestmark = pytest.mark.slow

LOOP = Path(__file__).parent / "clients" / "loop.py"
LOOPS: dict[str, dict[str, Any]] = {"sl_loop": {}, "rl_loop": {"group_size": 8, "max_tokens": 48}}


@dataclass
class Deployment:
    url: str
    folder: Path
    base: BaseModel

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
        yield Deployment(f"http://127.0.0.1:{port}", folder, smollm2)
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


@pytest.mark.parametrize("loop", LOOPS)
def test_the_cookbooks_loops_run_and_go_on(deployment: Deployment, loop: str) -> None:
    log = deployment.folder / loop
    given = {
        "base_url": f"{deployment.url}/tinker",
        "model_name": MODEL,
        "batch_size": 8,
        "lora_rank": 8,
        **LOOPS[loop],
    }
    python = python_with(*COOKBOOK)

    def run(**more: Any) -> str:
        options = [f"{name}={value}" for name, value in (given | {"log_path": log, "save_every": 2} | more).items()]
        told = run_client(python, "-m", f"tinker_cookbook.recipes.{loop}", *options, folder=deployment.folder)
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
