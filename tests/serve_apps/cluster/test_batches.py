"""A batch on a cluster whose processes are killed while it runs: each custom_id is in its output once."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from typing import Any

import httpx
import openai
import pytest

from tests.fixtures.asking import status
from tests.fixtures.cluster import Served

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

ENDPOINT = "/v1/completions"
NUM_LINES = 400
TIMEOUT_S = 300.0


def kill_actor(name: str) -> None:
    """The process of a replica of this deployment."""
    from ray.util.state import list_actors

    found: list[Any] = list_actors(filters=[("state", "=", "ALIVE")], detail=True)
    pids = [actor.pid for actor in found if actor.name and f"#{name}#" in actor.name]
    assert pids, [actor.name for actor in found]
    os.kill(pids[0], signal.SIGKILL)


def test_each_line_once_whatever_is_killed(served: Served) -> None:
    body = {"model": served.base.name, "prompt": "a", "max_tokens": 30, "ignore_eos": True}
    lines = [
        json.dumps({"custom_id": f"{i}", "method": "POST", "url": ENDPOINT, "body": body}) for i in range(NUM_LINES)
    ]
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=10, timeout=60) as client:
        file = client.files.create(file=("lines", "\n".join(lines).encode()), purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h")
        kills = [
            lambda: kill_actor("gateway"),
            lambda: os.kill(status(served)["replicas"][0]["pid"], signal.SIGKILL),
            lambda: kill_actor("api"),
        ]
        deadline, known = time.monotonic() + TIMEOUT_S, 0
        while True:
            assert time.monotonic() < deadline, batch
            try:
                batch = client.batches.retrieve(batch.id)
            except (openai.APIConnectionError, openai.InternalServerError, httpx.TransportError):
                time.sleep(0.2)
                continue
            if batch.status == "completed":
                break
            assert batch.request_counts is not None
            if kills and batch.request_counts.completed >= known + 50:
                known = batch.request_counts.completed
                kills.pop(0)()
            time.sleep(0.2)
        assert not kills
        assert batch.output_file_id is not None
        found = [json.loads(line)["custom_id"] for line in client.files.content(batch.output_file_id).text.splitlines()]
    assert Counter(found) == Counter(f"{i}" for i in range(NUM_LINES))
