"""Serving on a real Ray cluster: publish, resolve, generate over HTTP, promote, roll back, lose a replica."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loray.catalog import AdapterVersion
from loray.publishing import Destination, publish
from tests.cluster import SERVE, RayCluster, Served
from tests.engine.adapters import make_adapter

pytestmark = pytest.mark.cluster

PROMPT = "What is the capital of France?"
GREEDY: Any = {"temperature": 0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
LONG: Any = {"max_tokens": 480, "extra_body": {"ignore_eos": True}}
CHAT: Any = [{"role": "user", "content": "hi"}]


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0, timeout=90) as client:
        yield client


@pytest.fixture(scope="module")
def publish_lora(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], AdapterVersion]:
    from peft import LoraConfig

    def make(name: str, seed: int) -> AdapterVersion:
        folder = tmp_path_factory.mktemp("adapter") / name
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
        make_adapter(served.base, folder, config, seed=seed, std=0.3)
        return publish(folder, served.base, Destination(name, served.store, served.catalog))

    return make


@pytest.fixture(scope="module")
def tone(publish_lora: Callable[[str, int], AdapterVersion]) -> list[AdapterVersion]:
    return [publish_lora("tone", seed) for seed in (1, 2, 3)]


def answer(client: openai.OpenAI, model: str) -> str:
    return client.completions.create(model=model, prompt=PROMPT, **GREEDY).choices[0].text


def status(served: Served) -> Any:
    return httpx.get(f"{served.url}/status", timeout=30).json()


def eventually(what: Callable[[], bool], timeout_s: float = 20) -> bool:
    deadline = time.monotonic() + timeout_s
    while not (good := what()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return good


def test_every_name_of_a_model(client: openai.OpenAI, served: Served, tone: list[AdapterVersion]) -> None:
    served.catalog.promote("tone", "canary", 1)
    by_version = {v.version: answer(client, v.label) for v in tone}
    base = answer(client, "tiny")
    assert len({base, *by_version.values()}) == 4  # every adapter has its own output
    assert answer(client, "tone") == by_version[3]
    assert eventually(lambda: answer(client, "tone@canary") == by_version[1])
    models = [m.id for m in client.models.list()]
    assert models[0] == "tiny"
    assert "tone" in models
    labels = {label for r in status(served)["replicas"] for label in r["adapters_in_pool"]}
    assert {v.label for v in tone} <= labels


def metrics(served: Served) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = httpx.get(f"{served.url}/metrics", timeout=30).raise_for_status().text
    return {
        (s.name, frozenset(s.labels.items())): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_metrics_grow_by_what_is_asked(client: openai.OpenAI, served: Served, tone: list[AdapterVersion]) -> None:
    answer(client, tone[0].label)
    before = metrics(served)
    for _ in range(2):
        answer(client, tone[0].label)
    answer(client, "tiny")
    (replica,) = status(served)["replicas"]

    def grown(name: str, **labels: str) -> float:
        key = name, frozenset(labels.items())
        return after[key] - before.get(key, 0.0)

    def counted() -> bool:
        nonlocal after
        after = metrics(served)
        return grown("loray_generation_tokens_total", replica=replica["replica"]) >= 3 * GREEDY["max_tokens"]

    after = before
    assert eventually(counted)  # the engine's totals lag behind a little
    r = replica["replica"]
    assert grown("loray_generation_tokens_total", replica=r) == 3 * GREEDY["max_tokens"]
    assert grown("loray_adapter_requests_total", replica=r, tier="pool") == 2
    assert grown("loray_time_to_first_token_seconds_count", replica=r, method="lora") == 2
    assert grown("loray_request_success_total", replica=r, method="base", finished_reason="length") == 1
    assert grown("loray_http_requests_total", route="/v1/completions", code="200") == 3
    assert sum(after[key] - before.get(key, 0.0) for key in after if key[0] == "loray_routing_decisions_total") == 3
    assert after["loray_replicas_reporting", frozenset()] == 1


def test_promote_changes_the_next_answer_and_rollback_restores_it(
    client: openai.OpenAI, served: Served, tone: list[AdapterVersion]
) -> None:
    answers = {v.version: answer(client, v.label) for v in tone}
    served.catalog.promote("tone", "prod", 2)
    assert eventually(lambda: answer(client, "tone") == answers[2])
    served.catalog.promote("tone", "prod", 1)
    assert eventually(lambda: answer(client, "tone@prod") == answers[1])
    served.catalog.rollback("tone", "prod")
    assert eventually(lambda: answer(client, "tone") == answers[2])


def test_what_was_just_published_answers_at_once(
    client: openai.OpenAI, publish_lora: Callable[[str, int], AdapterVersion]
) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        answer(client, "fresh")
    assert missing.value.code == "model_not_found"
    publish_lora("fresh", 7)
    assert answer(client, "fresh") != answer(client, "tiny")


def test_streaming(client: openai.OpenAI, tone: list[AdapterVersion]) -> None:
    whole = client.chat.completions.create(model="tone@2", messages=CHAT, **GREEDY)
    stream = client.chat.completions.create(
        model="tone@2", messages=CHAT, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert chunks[-1].usage is not None
    assert whole.usage is not None
    streamed = chunks[-1].usage.model_copy(update={"prompt_tokens_details": whole.usage.prompt_tokens_details})
    assert streamed == whole.usage  # except for the prefix cache's tokens


def test_bad_requests(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="maximum context length is 512 tokens") as long:
        client.completions.create(model="tiny", prompt="x" * 600)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="tools is not supported"):
        client.chat.completions.create(model="tiny", messages=CHAT, extra_body={"tools": [{"type": "function"}]})
    response = httpx.post(f"{client.base_url}completions", content=b"{")
    assert response.status_code == 400
    assert "not valid JSON" in response.json()["error"]["message"]


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


def test_a_damaged_adapter_fails_alone(
    client: openai.OpenAI, served: Served, publish_lora: Callable[[str, int], AdapterVersion]
) -> None:
    version = publish_lora("damaged", 9)
    sha256 = version.manifest.files["adapter_model.safetensors"]
    (blob,) = Path(served.settings.store.removeprefix("file://")).rglob(sha256)
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.chmod(0o644)
    blob.write_bytes(bytes(data))
    with pytest.raises(openai.InternalServerError, match="damaged") as e:
        answer(client, "damaged")
    assert e.value.code == "adapter_damaged"
    assert answer(client, "tiny")


def test_overload_is_429_with_a_time_to_retry(served: Served) -> None:
    async def ask(client: openai.AsyncOpenAI) -> Any:
        try:
            return await client.completions.create(model="tiny", prompt="a", **LONG)
        except openai.RateLimitError as e:
            return e

    async def all_at_once() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(
                *(ask(client) for _ in range(2 * (SERVE["max_num_seqs"] + SERVE["max_queued"])))
            )

    results = asyncio.run(all_at_once())
    refused = [r for r in results if isinstance(r, openai.RateLimitError)]
    assert 0 < len(refused) < len(results)
    assert refused[0].code == "overloaded"
    assert int(refused[0].response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnected_client_frees_the_engine(served: Served, stream: bool) -> None:
    before = status(served)["totals"]
    body = {"model": "tiny", "prompt": "a", "max_tokens": 500, "ignore_eos": True, "n": 2, "stream": stream}
    with httpx.Client(base_url=served.url, timeout=httpx.Timeout(30, read=None if stream else 0.3)) as http:
        if stream:
            with http.stream("POST", "/v1/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                http.post("/v1/completions", json=body)
    assert eventually(lambda: status(served)["totals"]["num_running"] == 0)
    after = status(served)["totals"]
    assert after["num_finished"] == before["num_finished"]  # it was cancelled, it did not run to its end
    assert after["blocks"]["kv"] == 0


def test_a_replica_killed_in_the_middle_of_a_stream(client: openai.OpenAI, served: Served) -> None:
    (replica,) = status(served)["replicas"]
    stream = client.chat.completions.create(model="tiny", messages=CHAT, stream=True, **LONG)
    chunks = [next(stream) for _ in range(3)]
    os.kill(replica["pid"], signal.SIGKILL)
    with pytest.raises(openai.APIError, match="lost; send it again") as e:
        chunks.extend(stream)
    assert e.value.code == "engine_unavailable"
    assert 3 <= len(chunks) < LONG["max_tokens"]
    started = time.monotonic()
    assert answer(client, "tiny")
    assert time.monotonic() - started < 60
    (fresh,) = status(served)["replicas"]
    assert fresh["replica"] != replica["replica"]
