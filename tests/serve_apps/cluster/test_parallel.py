"""A replica of two ranks on a real Ray cluster: the output of one rank, and a new replica after a rank is lost, at
which an answer goes on.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from loray.publishing import Destination, publish
from tests.engine.adapters import make_adapter
from tests.fixtures.cluster import RayCluster, Served, deployed

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

BODY: dict[str, Any] = {"prompt": "What is the capital of France?", "temperature": 0, "max_tokens": 12}


def answer(url: str, model: str) -> str:
    response = httpx.post(f"{url}/v1/completions", json=BODY | {"model": model, "ignore_eos": True}, timeout=60)
    return str(response.raise_for_status().json()["choices"][0]["text"])


def streamed(url: str, *, then: Callable[[], None] = lambda: None) -> str:
    """A long answer; `then` is called when it has begun."""
    text, body = "", BODY | {"model": "tiny", "ignore_eos": True, "max_tokens": 480, "stream": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
        for line in response.iter_lines():
            if line.startswith("data: {"):
                if not text:
                    then()
                text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
    return text


def replica(app: Served) -> str:
    (found,) = httpx.get(f"{app.url}/status", timeout=30).raise_for_status().json()["replicas"]
    return str(found["replica"])


def rank_pids() -> list[int]:
    from ray.util.state import list_actors

    actors = list_actors(filters=[("class_name", "=", "RankActor"), ("state", "=", "ALIVE")], detail=True)
    return [actor.pid for actor in actors]


def test_a_lost_rank_gives_a_new_replica(ray_cluster: RayCluster, served: Served, tmp_path: Path) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=6, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
    make_adapter(served.base, tmp_path / "split", config, seed=7, std=0.3)
    publish(tmp_path / "split", served.base, Destination("split", served.store, served.catalog))
    expected = {model: answer(served.url, model) for model in ("tiny", "split")}
    assert expected["tiny"] != expected["split"]
    with deployed(ray_cluster, served, "parallel", tensor_parallel_size=2) as app:
        assert {model: answer(app.url, model) for model in expected} == expected
        before, (pid,) = replica(app), rank_pids()
        undisturbed = streamed(app.url)
        assert streamed(app.url, then=lambda: os.kill(pid, signal.SIGKILL)) == undisturbed
        deadline = time.monotonic() + 90
        while True:  # requests fail until Serve has noticed the loss
            try:
                assert {model: answer(app.url, model) for model in expected} == expected
                break
            except httpx.HTTPError:
                assert time.monotonic() < deadline
                time.sleep(0.2)
        assert replica(app) != before
        assert pid not in rank_pids()
