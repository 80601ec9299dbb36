"""Embeddings on both servers: clients unmodified, with a base and with an adapter."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from torch.nn.functional import normalize
from transformers import AutoTokenizer

from loray.bases.registry import BaseModel
from loray.catalog import AdapterVersion
from tests.fixtures.cluster import Served
from tests.fixtures.peft_adapters import hf_model
from tests.fixtures.standalone import standalone

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


@pytest.mark.slow
def test_a_real_model_embeds_as_transformers(smollm2: BaseModel, tmp_path: Path) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(smollm2.path), hf_model(smollm2)
    with (
        standalone(tmp_path, base=smollm2, pool_bytes=64 << 20) as server,
        openai.OpenAI(base_url=f"{server.served.url}/v1", api_key="none", max_retries=0, timeout=90) as client,
    ):
        found = client.embeddings.create(model=smollm2.name, input=TEXTS)
    for text, one in zip(TEXTS, found.data, strict=True):
        with torch.inference_mode():
            states = model(**tokenizer(text, return_tensors="pt"), output_hidden_states=True).hidden_states[-1][0]
        wanted, got = normalize(states.mean(0), dim=0), torch.tensor(one.embedding)
        assert len(got) == 576
        torch.testing.assert_close(got, wanted, atol=1e-3, rtol=0)
