"""What only Ray Serve has: logs of replicas, routing, and a replica that is lost.

`tests/serve_apps/servers` has what both servers do.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from loray.spec import FleetSpec, engine_of
from serve_apps.deployment import ServeApi, serve_config
from tests.fixtures.asking import CHAT, answer, eventually, status
from tests.fixtures.cluster import RayCluster, Served

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
    """There is one: the stream goes on at its successor."""
    (replica,) = status(served)["replicas"]
    num_tokens = 1200  # more than the engine makes before the kill
    asked: Any = {"model": "tiny", "messages": CHAT, "max_tokens": num_tokens, "seed": 1}
    asked |= {"extra_body": {"ignore_eos": True, "return_token_ids": True}}
    stream = client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **asked)
    chunks = [next(stream) for _ in range(3)]
    os.kill(replica["pid"], signal.SIGKILL)
    chunks.extend(stream)
    (fresh,) = status(served)["replicas"]
    assert fresh["replica"] != replica["replica"]
    assert fresh["num_output_tokens"] < num_tokens
    undisturbed = client.chat.completions.create(**asked)
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    tokens = [token for choice in choices for token in (choice.model_extra or {}).get("token_ids") or ()]
    assert tokens == (undisturbed.choices[0].model_extra or {})["token_ids"]
    assert "".join(choice.delta.content or "" for choice in choices) == undisturbed.choices[0].message.content
    assert chunks[-1].usage is not None
    assert undisturbed.usage is not None
    used, usage = chunks[-1].usage, undisturbed.usage
    assert (used.prompt_tokens, used.completion_tokens) == (usage.prompt_tokens, usage.completion_tokens)
    assert counted(served, "loray_resumes_total", 'reason="lost"') == 1


@pytest.mark.slow
def test_a_replica_that_is_removed_hands_its_streams_over(
    ray_cluster: RayCluster, client: openai.OpenAI, served: Served
) -> None:
    api, config = ServeApi(ray_cluster.address), serve_config(FleetSpec.of(served.spec), served.settings)
    asked: Any = {"model": "tiny", "messages": CHAT, "max_tokens": 3500, "seed": 1, "extra_body": {"ignore_eos": True}}

    def scale(num_replicas: int) -> None:
        config["applications"][0]["deployments"] = [{"name": engine_of(served.base.name), "num_replicas": num_replicas}]
        api.deploy(config)

    def num_replicas() -> int:
        return len(status(served)["replicas"])

    scale(2)
    assert eventually(lambda: num_replicas() == 2, 60)
    undisturbed = client.chat.completions.create(**asked).choices[0].message.content
    before = counted(served, "loray_resumes_total", 'reason="moved"')
    streams = [client.chat.completions.create(stream=True, **asked) for _ in range(4)]
    firsts = [[next(stream), next(stream)] for stream in streams]
    with ThreadPoolExecutor(4) as pool:
        rests = [pool.submit(list, stream) for stream in streams]
        scale(1)
        for first, rest in zip(firsts, rests, strict=True):
            chunks = [*first, *rest.result()]
            assert "".join(c.choices[0].delta.content or "" for c in chunks) == undisturbed
    assert eventually(lambda: counted(served, "loray_resumes_total", 'reason="moved"') > before, 20)
    assert eventually(lambda: num_replicas() == 1, 30)


def counted(served: Served, name: str, label: str = "") -> float:
    """The sum of a counter's series that have `label`."""
    text = httpx.get(f"{served.url}/metrics", timeout=30).raise_for_status().text
    lines = (line for line in text.splitlines() if line.startswith(f"{name}{{") and label in line)
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_every_request_is_a_decision_of_the_router(client: openai.OpenAI, served: Served) -> None:
    before = counted(served, "loray_routing_decisions_total")
    for _ in range(3):
        answer(client, "tiny")
    assert counted(served, "loray_routing_decisions_total") - before == 3
