"""Embeddings over HTTP: OpenAI's client on a real engine against transformers + PEFT, and what is refused."""

from __future__ import annotations

import asyncio
import struct
from base64 import b64decode
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import normalize
from transformers import AutoTokenizer

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.engine.async_engine import AsyncEngine
from loray.errors import Overloaded, SpecError
from loray.schemas.openai.embeddings import EmbeddingList
from loray.spec import GenerateRequest, Pooling, TokenDelta
from serve_apps.standalone.server import LocalEngineClient
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.engines import make_engine
from tests.fixtures.gateway import GatewayClient, ScriptedEngines, error_of, gateway_app, openai_of, register
from tests.fixtures.peft_adapters import LINEAR_ROPE, Oracle, TestAdapter, make_adapter

TEXTS = ("a", "Once upon a time", "x" * 300)  # shorter and longer than a step
VECTOR = struct.unpack("<3f", struct.pack("<3f", 0.5, -1e-7, 1 / 3))
EMBEDDED = TokenDelta((), "stop", embedding=VECTOR)


@pytest.fixture(scope="module")
def tuned(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TestAdapter]:
    """An adapter, and one with another RoPE."""
    folder = tmp_path_factory.mktemp("adapters")
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"])
    longer = LoraConfig(r=4, target_modules=["q_proj", "k_proj"], modules_to_save=["norm"])
    return {
        "tone": make_adapter(base, folder / "tone", config, seed=4, std=0.12),
        "long": make_adapter(base, folder / "long", longer, seed=5, std=0.12, rope=LINEAR_ROPE, context_length=1024),
    }


@pytest.fixture(scope="module")
def real(
    base: BaseModel, tuned: dict[str, TestAdapter], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, LocalEngineClient]]:
    """A catalog with the adapters, and an engine that has them and computes 16 tokens in a step."""
    url = sqlite_catalog(tmp_path_factory.mktemp("catalog"))
    catalog, served = Catalog(url), []
    register(catalog, "long", base.fingerprint)  # the first version of each name has the same digest
    for name, adapter in tuned.items():
        version = register(catalog, name, base.fingerprint, context_length=adapter.ref.context_length)
        served.append(replace(adapter, ref=replace(adapter.ref, digest=version.digest)))
    stream = AsyncEngine(make_engine(base, served, max_num_batched_tokens=16, max_num_seqs=8, num_threads=1))
    stream.start()
    yield url, LocalEngineClient(stream)
    stream.stop()
    stream._engine.check_integrity()


@pytest.fixture(scope="module")
def app_of(base: BaseModel, real: tuple[str, LocalEngineClient]) -> Callable[..., FastAPI]:
    url, engines = real
    return lambda **spec: gateway_app(base, url, engines, **{"max_num_seqs": 8, "matryoshka": (16,)} | spec)


def expected(oracle: Oracle, ids: Sequence[int], adapter: TestAdapter | None, pooling: Pooling) -> Tensor:
    """The state of one token or their mean, as transformers + PEFT have it."""
    model = oracle._models[None if adapter is None else adapter.ref.digest]
    with torch.inference_mode():
        x_TD = model(input_ids=torch.tensor([list(ids)]), output_hidden_states=True).hidden_states[-1][0]
    return x_TD[-1] if pooling == "last" else x_TD.mean(0)


@pytest.mark.parametrize("pooling", ["last", "mean"])
async def test_openais_client_gets_the_states_of_transformers_and_peft(
    app_of: Callable[..., FastAPI], base: BaseModel, tuned: dict[str, TestAdapter], pooling: Pooling
) -> None:
    oracle = Oracle(base, [*tuned.values()])
    tokenizer = AutoTokenizer.from_pretrained(base.path)
    tokenized = [tokenizer(text)["input_ids"] for text in TEXTS]
    async with openai_of(app_of(pooling=pooling)) as client:
        for name, adapter in ((base.name, None), *tuned.items()):
            found = await client.embeddings.create(model=name, input=list(TEXTS))  # base64, which the client decodes
            numbers = await client.embeddings.create(model=name, input=tokenized, encoding_format="float")
            raw = await client.embeddings.create(model=name, input=TEXTS[2], extra_body={"normalize": False})
            short = await client.embeddings.create(model=name, input=TEXTS[2], dimensions=16)
            assert (found.object, found.model) == ("list", name)
            assert [e.index for e in found.data] == [0, 1, 2]
            assert found.usage.prompt_tokens == found.usage.total_tokens == sum(map(len, tokenized))
            states = [expected(oracle, tokens, adapter, pooling) for tokens in tokenized]
            for wanted, one, other in zip(states, found.data, numbers.data, strict=True):
                torch.testing.assert_close(
                    torch.tensor(one.embedding), normalize(wanted, dim=0), atol=1e-3, rtol=0, msg=name
                )
                torch.testing.assert_close(torch.tensor(other.embedding), torch.tensor(one.embedding))
            torch.testing.assert_close(torch.tensor(raw.data[0].embedding), states[2], atol=1e-3, rtol=1e-3)
            cut = normalize(states[2][:16], dim=0)
            torch.testing.assert_close(torch.tensor(short.data[0].embedding), cut, atol=1e-3, rtol=0)


async def test_many_inputs_beside_a_stream(app_of: Callable[..., FastAPI], base: BaseModel) -> None:
    texts = [f"number {i}" for i in range(2048)]
    async with openai_of(app_of(pooling="last")) as client:
        fields: dict[str, Any] = {"model": base.name, "prompt": "a", "max_tokens": 100, "temperature": 0}
        alone = await client.completions.create(**fields)
        stream = await client.completions.create(**fields, stream=True, extra_body={"ignore_eos": True})
        embedding = asyncio.create_task(client.embeddings.create(model=base.name, input=texts))
        text = "".join([chunk.choices[0].text async for chunk in stream])
        assert not embedding.done()  # the stream's tokens came in the same steps
        found = await embedding
        (again,) = (await client.embeddings.create(model="tone", input=[texts[77]])).data
    assert text.startswith(alone.choices[0].text)
    assert [e.index for e in found.data] == [*range(2048)]
    vectors = torch.tensor([e.embedding for e in found.data])
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2048))
    assert again.embedding != found.data[77].embedding  # its adapter's


class Counting(ScriptedEngines):
    """Notes how many requests it had at once, at most."""

    num, most = 0, 0

    async def generate(self, request: GenerateRequest, *, fit: bool) -> AsyncGenerator[TokenDelta, None]:
        self.num += 1
        self.most = max(self.most, self.num)
        await asyncio.sleep(0)
        try:
            async for item in super().generate(request, fit=fit):
                yield item
        finally:
            self.num -= 1


Served = Callable[..., Any]


def embed(client: GatewayClient, headers: dict[str, str] | None = None, **fields: Any) -> Any:
    return client.post("/v1/embeddings", json={"model": client.base, "input": "abc"} | fields, headers=headers)


def test_bodies_as_they_are_written(client_of: Served, base: BaseModel) -> None:
    engines = ScriptedEngines([EMBEDDED])
    with client_of(engines, pooling="mean") as client:
        numbers = embed(client, input=["abc", "de"], user="someone")
        packed = embed(client, encoding_format="base64")
    assert numbers.json() == {
        "object": "list",
        "data": [
            {"object": "embedding", "index": i, "embedding": [0.5, -1.00000001e-07, 0.333333343]} for i in range(2)
        ],
        "model": base.name,
        "usage": {"prompt_tokens": 5, "total_tokens": 5},
    }
    (one, _) = EmbeddingList.model_validate_json(numbers.content, strict=True).data
    assert struct.pack("<3f", *map(float, one.embedding)) == struct.pack("<3f", *VECTOR)
    assert numbers.headers["x-request-id"].startswith("embd-")
    assert struct.unpack("<3f", b64decode(packed.json()["data"][0]["embedding"])) == VECTOR
    first, second, _ = engines.requests
    assert (first.params.max_tokens, first.tenant, first.pooling.kind) == (0, "someone", "mean")
    assert [len(r.prompt_ids) for r in (first, second)] == [3, 2]
    assert first.request_id != second.request_id


def test_so_many_are_with_the_engines_as_they_run(client_of: Served) -> None:
    engines = Counting([EMBEDDED])
    with client_of(engines, pooling="last", max_num_seqs=3) as client:
        assert len(embed(client, input=["a"] * 50).json()["data"]) == 50
    assert engines.most == 3
    assert engines.num == 0


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"input": ["a", "", "b"]}, "input.1", "input 1 is empty"),
        ({"input": [[1], []]}, "input.1", "input 1 is empty"),
        ({"input": ""}, "input.0", "empty"),
        ({"input": []}, "input", "must be a string"),
        ({"input": ["a", [1]]}, "input", "must be a string"),
        ({"input": ["a", "x" * 513]}, "input.1", "512 tokens, but input 1 has 513"),
        ({"input": ["a", "x" * 100_000]}, "input.1", "maximum context length"),
        ({"input": [[1], [2], [320]]}, "input.2", "outside the vocabulary of 320"),
        ({"input": ["a"] * 2049}, "input", "at most 2,048"),
        ({"input": [[1] * 500] * 601}, "input", "300,500 tokens; at most 300,000"),
        ({"dimensions": 17}, "dimensions", "ask for 16, 32, 64"),
        ({"dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"encoding_format": "int8"}, "encoding_format", "'float' or 'base64'"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens", "at least 1"),
        ({"input": "a", "truncate_prompt_tokens": -2}, "truncate_prompt_tokens", "greater than"),
    ],
)
def test_what_cannot_be_embedded_is_refused_and_nothing_is_computed(
    client_of: Served, fields: dict[str, Any], param: str, message: str
) -> None:
    engines = ScriptedEngines([EMBEDDED])
    with client_of(engines, pooling="last", matryoshka=(16, 32)) as client:
        error = error_of(embed(client, **fields), 400)
    assert error["param"] == param
    assert message in error["message"]
    assert engines.requests == []


def test_a_base_that_does_not_pool_says_how_it_would(client_of: Served) -> None:
    with client_of(ScriptedEngines([EMBEDDED])) as client:
        error = error_of(embed(client), 400)
        assert (error["code"], error["param"]) == ("model_not_supported", "model")
        assert "`pooling: mean`" in error["message"]
        assert error_of(embed(client, model="other"), 404)["code"] == "model_not_found"
    with (
        pytest.raises(SpecError, match=r"embeddings of tiny-\d+ have 64 numbers"),
        client_of(ScriptedEngines(), pooling="last", matryoshka=(128,)),
    ):
        pass


def test_texts_are_cut_at_their_end(client_of: Served) -> None:
    engines = ScriptedEngines([EMBEDDED])
    with client_of(engines, pooling="last") as client:
        for given, keep in (("abcdef", 4), ("x" * 600, -1), ([64, 65, 66], 2), ("a", 5)):
            assert embed(client, input=given, truncate_prompt_tokens=keep).status_code == 200
    assert [len(r.prompt_ids) for r in engines.requests] == [4, 512, 2, 1]
    assert engines.requests[0].prompt_ids == tuple(c - 33 for c in b"abcd")


def test_one_failure_ends_the_request(client_of: Served) -> None:
    engines = ScriptedEngines([Overloaded("too many wait", 1.0)])
    with client_of(engines, pooling="last", max_num_seqs=2) as client:
        error = error_of(embed(client, input=["a"] * 20), 429)
    assert error["code"] == "overloaded"
    assert len(engines.requests) <= 2
