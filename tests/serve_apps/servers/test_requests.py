"""Requests over HTTP: streams, refusals, limits, overload, clients that leave, metrics, usage, and other routes."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loray.catalog import AdapterVersion
from loray.spec import TrainSpec
from tests.fixtures.asking import CHAT, GREEDY, LONG, PROMPT, answer, eventually, status
from tests.fixtures.cluster import SERVE, Served
from tests.fixtures.recipes import RECIPE


def metrics(server: Served) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    text = httpx.get(f"{server.url}/metrics", timeout=30).raise_for_status().text
    return {
        (
            s.name,
            frozenset((label, value) for label, value in s.labels.items() if label not in ("gateway", "base")),
        ): s.value
        for family in text_string_to_metric_families(text)
        for s in family.samples
    }


def test_metrics_grow_by_what_is_asked(client: openai.OpenAI, server: Served, tone: list[AdapterVersion]) -> None:
    # The engine takes totals after it has delivered, but before it computes what comes next. So the adapter's are known
    # after a prompt of the base without answer, and that prompt's own after the adapter's first answer.
    base = "loray_request_success_total", "base"
    answer(client, tone[0].label)
    client.completions.create(model="tiny", prompt=PROMPT, echo=True, logprobs=0, max_tokens=0)
    before = metrics(server)
    answer(client, tone[0].label)
    before |= {k: v for k, v in metrics(server).items() if (k[0], dict(k[1]).get("method")) == base}
    answer(client, tone[0].label)
    answer(client, "tiny")
    (replica,) = status(server)["replicas"]

    def grown(name: str, **labels: str) -> float:
        key = name, frozenset(labels.items())
        return after[key] - before.get(key, 0.0)

    def counted() -> bool:
        nonlocal after
        after = metrics(server)
        return grown("loray_generation_tokens_total", replica=replica["replica"]) >= 3 * GREEDY["max_tokens"]

    after = before
    assert eventually(counted)  # the engine's totals lag behind a little
    r = replica["replica"]
    assert grown("loray_generation_tokens_total", replica=r) == 3 * GREEDY["max_tokens"]
    assert grown("loray_adapter_requests_total", replica=r, tier="pool") == 2
    assert grown("loray_time_to_first_token_seconds_count", replica=r, method="lora") == 2
    assert grown("loray_request_success_total", replica=r, method="base", finished_reason="length") == 1
    assert grown("loray_http_requests_total", route="/v1/completions", code="200") == 3
    assert after["loray_replicas_reporting", frozenset()] == 1


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
    with pytest.raises(openai.BadRequestError, match="maximum context length is 4096 tokens") as long:
        client.completions.create(model="tiny", prompt="x" * 5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match=r"tools\.0\.function' is required"):
        client.chat.completions.create(model="tiny", messages=CHAT, extra_body={"tools": [{"type": "function"}]})
    response = httpx.post(f"{client.base_url}completions", content=b"{", headers={"Content-Type": "application/json"})
    assert response.status_code == 400
    assert "not valid JSON" in response.json()["error"]["message"]


def test_overload_is_429_with_a_time_to_retry(server: Served) -> None:
    async def ask(client: openai.AsyncOpenAI) -> Any:
        try:
            return await client.completions.create(model="tiny", prompt="a", **LONG)
        except openai.RateLimitError as e:
            return e

    async def all_at_once() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            return await asyncio.gather(
                *(ask(client) for _ in range(2 * (SERVE["max_num_seqs"] + SERVE["max_queued"])))
            )

    results = asyncio.run(all_at_once())
    refused = [r for r in results if isinstance(r, openai.RateLimitError)]
    assert 0 < len(refused) < len(results)
    assert refused[0].code == "overloaded"
    assert int(refused[0].response.headers["retry-after"]) >= 1


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnected_client_frees_the_engine(server: Served, stream: bool) -> None:
    before = status(server)["totals"]
    fields = {"model": "tiny", "prompt": "a", "max_tokens": 3900, "ignore_eos": True, "n": 2, "stream": stream}
    body = json.dumps(fields).encode()
    url = urlsplit(server.url)
    with socket.create_connection((url.hostname or "", url.port or 0), timeout=30) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Length: {len(body)}\r\n"
        client.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
        if stream:
            assert client.recv(1024).startswith(b"HTTP/1.1 200")
        else:
            assert eventually(lambda: status(server)["totals"]["num_running"] > 0)
    assert eventually(lambda: status(server)["totals"]["num_running"] == 0)
    after = status(server)["totals"]
    assert after["num_finished"] == before["num_finished"]  # it was cancelled, it did not run to its end
    assert after["blocks"]["kv"] == 0


def test_a_response_has_one_request_id(server: Served) -> None:
    """Its client's, or one that the server makes."""
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1}
    for given in ({"X-Request-Id": "mine"}, {}):
        response = httpx.post(f"{server.url}/v1/completions", json=body, headers=given, timeout=30)
        (request_id,) = response.headers.get_list("x-request-id")
        assert request_id == given.get("X-Request-Id", request_id)


def test_the_catalogs_links_and_the_document_have_the_route_prefix(server: Served) -> None:
    for job_id in ("linked-1", "linked-2"):
        server.catalog.jobs.add(job_id, name="linked", recipe=TrainSpec.parse(RECIPE, source="the test"))
    response = httpx.get(f"{server.url}/api/v1/jobs", params={"limit": 1}, timeout=30)
    assert response.links["next"]["url"].startswith("/api/v1/jobs?limit=1&cursor=")
    document = httpx.get(f"{server.url}/api/v1/openapi.json", timeout=30).json()
    assert document["servers"] == [{"url": "/api/v1"}]
    missing = httpx.get(f"{server.url}/api/v1/adapters/nobody", timeout=30)
    assert (missing.status_code, missing.headers["content-type"]) == (404, "application/problem+json")
    assert json.loads(missing.text)["type"] == "urn:loray:problem:adapter-not-found"


MIB = 1 << 20


JSON = {"Content-Type": "application/json"}


def chunks(num: int) -> Iterator[bytes]:
    """A body whose length the client does not say."""
    return (b" " * MIB for _ in range(num))


@pytest.mark.parametrize("says_length", [True, False])
def test_a_body_that_is_too_large(server: Served, client: openai.OpenAI, *, says_length: bool) -> None:
    def attack(_: int) -> httpx.Response:
        content = b" " * (8 * MIB) if says_length else chunks(8)
        return httpx.post(f"{server.url}/v1/completions", content=content, headers=JSON, timeout=60)

    with ThreadPoolExecutor(4) as pool:
        for response in pool.map(attack, range(4)):
            assert (response.status_code, response.json()["error"]["code"]) == (413, "request_too_large")
    assert client.completions.create(model=server.base.name, prompt="abc", max_tokens=2).choices


def test_shapes_that_are_refused(server: Served, client: openai.OpenAI) -> None:
    deep = httpx.post(f"{server.url}/v1/completions", content=b"[" * 100_000, headers=JSON, timeout=60)
    assert (deep.status_code, "nested deeper" in deep.text) == (400, True)
    with pytest.raises(openai.BadRequestError, match="at most 16") as many:
        client.completions.create(model=server.base.name, prompt="a", stop=["x"] * 10_000)
    assert many.value.param == "stop"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=server.base.name, prompt="x" * (MIB // 2))
    assert long.value.code == "context_length_exceeded"


def test_a_response_is_the_chats_answer(server: Served, client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=server.base.name, messages=[{"role": "user", "content": "hi"}], max_tokens=6, temperature=0
    )
    response = client.responses.create(model=server.base.name, input="hi", max_output_tokens=6, temperature=0)
    assert response.output_text == chat.choices[0].message.content
    with client.responses.stream(model=server.base.name, input="hi", max_output_tokens=6, temperature=0) as stream:
        assert "".join(e.delta for e in stream if e.type == "response.output_text.delta") == response.output_text


def test_tokens(server: Served) -> None:
    tokens = httpx.post(f"{server.url}/tokenize", json={"prompt": "abc"}).json()["tokens"]
    assert httpx.post(f"{server.url}/detokenize", json={"tokens": tokens}).json() == {"prompt": "abc"}
    assert httpx.get(f"{server.url}/ping").status_code == 200


TENANT = "counted"  # of this test alone: others' events may still be on their way


def test_usage_of_requests(server: Served) -> None:
    def used() -> tuple[int, int, int]:
        params = {"group_by": "model", "tenant": TENANT}
        items = httpx.get(f"{server.url}/api/v1/usage", params=params, timeout=30).raise_for_status().json()["items"]
        names = ("num_requests", "num_prompt_tokens", "num_output_tokens")
        return tuple(sum(row[name] for row in items) for name in names)  # type: ignore[return-value]

    before = used()
    body = {"model": server.base.name, "prompt": "abc", "max_tokens": 4, "ignore_eos": True}
    for _ in range(3):
        response = httpx.post(
            f"{server.url}/v1/completions", json=body, headers={"X-Tenant-Id": TENANT}, timeout=60
        ).raise_for_status()
    usage = response.json()["usage"]
    wanted = (3, 3 * usage["prompt_tokens"], 3 * usage["completion_tokens"])
    assert eventually(lambda: tuple(a - b for a, b in zip(used(), before, strict=True)) == wanted)
