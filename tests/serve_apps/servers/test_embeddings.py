"""Embeddings on both servers: clients unmodified, with a base and with an adapter."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from loray.catalog import AdapterVersion
from tests.fixtures.cluster import Served

TEXTS = ["a cat", "a dog", "the weather of tomorrow"]


def test_openais_client_embeds_with_base_and_adapter(client: openai.OpenAI, tone: list[AdapterVersion]) -> None:
    vectors = {}
    for model in ("tiny", tone[0].label, tone[1].label):
        found = client.embeddings.create(model=model, input=TEXTS)
        (again,) = client.embeddings.create(model=model, input=TEXTS[1], encoding_format="float").data
        assert [math.hypot(*e.embedding) for e in found.data] == pytest.approx([1.0] * 3, abs=1e-5)
        assert again.embedding == pytest.approx(found.data[1].embedding, abs=1e-5)
        vectors[model] = tuple(found.data[0].embedding)
    assert len(set(vectors.values())) == 3
    with pytest.raises(openai.BadRequestError, match="input 1 is empty") as refused:
        client.embeddings.create(model="tiny", input=["a", ""])
    assert refused.value.param == "input.1"
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="other", input="a")


def test_more_inputs_than_may_wait_at_the_engine(client: openai.OpenAI, server: Served) -> None:
    num = 4 * (server.spec.max_num_seqs + server.spec.max_queued)
    found = client.embeddings.create(model="tiny", input=[f"text {i}" for i in range(num)])
    assert len({tuple(e.embedding) for e in found.data}) == num


@pytest.fixture
def loop() -> Iterator[None]:
    with asyncio.Runner() as runner:
        asyncio.set_event_loop(runner.get_loop())  # the library makes one where there is none, and leaves it open
        yield
        asyncio.set_event_loop(None)


@pytest.mark.usefixtures("loop")
def test_litellm_embeds(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it is fetched
    import litellm

    found: Any = litellm.embedding(model="openai/tiny", input=TEXTS, client=client, num_retries=0)
    expected = client.embeddings.create(model="tiny", input=TEXTS, encoding_format="float")
    for one, other in zip(found.data, expected.data, strict=True):
        assert one["embedding"] == pytest.approx(other.embedding, abs=1e-5)
    assert found.usage.prompt_tokens == expected.usage.prompt_tokens
