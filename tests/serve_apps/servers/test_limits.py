"""Requests that are too large or too deep, and routes beside completions, on both servers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from tests.fixtures.cluster import Served

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
