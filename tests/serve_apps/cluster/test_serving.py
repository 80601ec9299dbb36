"""What only Ray Serve has: logs of replicas, routing, and a replica that is lost.

`tests/serve_apps/servers` has what both servers do.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.cluster import RayCluster, Served
from tests.serve_apps.asking import CHAT, answer, eventually, status

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=90) as client:
        yield client


def test_client_errors_are_logged_without_traceback(
    client: openai.OpenAI, served: Served, ray_cluster: RayCluster
) -> None:
    (replica,) = status(served)["replicas"]
    with pytest.raises(openai.BadRequestError, match="vocabulary"):
        client.completions.create(model="tiny", prompt=[5000])
    logs = Path(ray_cluster.local.temp_dir) / "session_latest" / "logs" / "serve"
    (log,) = logs.glob(f"replica_*{replica['replica']}*.log")
    assert eventually(lambda: "request refused: RequestError: " in log.read_text())
    assert "Traceback" not in log.read_text()


def test_a_replica_killed_in_the_middle_of_a_stream(client: openai.OpenAI, served: Served) -> None:
    (replica,) = status(served)["replicas"]
    num_tokens = 3000  # more than the engine makes before the kill
    asked: Any = {"max_tokens": num_tokens, "extra_body": {"ignore_eos": True}}
    stream = client.chat.completions.create(model="tiny", messages=CHAT, stream=True, **asked)
    chunks = [next(stream) for _ in range(3)]
    os.kill(replica["pid"], signal.SIGKILL)
    with pytest.raises(openai.APIError, match="lost; send it again") as e:
        chunks.extend(stream)
    assert e.value.code == "engine_unavailable"
    assert 3 <= len(chunks) < num_tokens
    started = time.monotonic()
    assert answer(client, "tiny")
    assert time.monotonic() - started < 60
    (fresh,) = status(served)["replicas"]
    assert fresh["replica"] != replica["replica"]


def routed(served: Served) -> float:
    text = httpx.get(f"{served.url}/metrics", timeout=30).raise_for_status().text
    lines = (line for line in text.splitlines() if line.startswith("loray_routing_decisions_total{"))
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_every_request_is_a_decision_of_the_router(client: openai.OpenAI, served: Served) -> None:
    before = routed(served)
    for _ in range(3):
        answer(client, "tiny")
    assert routed(served) - before == 3
