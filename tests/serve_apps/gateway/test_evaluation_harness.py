"""The requests that lm-evaluation-harness sends to a completions endpoint, and its use of the responses."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient
from peft import LoraConfig
from transformers import AutoTokenizer

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.engine.async_engine import AsyncEngine
from serve_apps.standalone.server import LocalEngineClient
from tests.engine.adapters import Oracle, TestAdapter, make_adapter
from tests.engine.harness import make_engine
from tests.fixtures.catalogs import sqlite_catalog
from tests.serve_apps.gateway.scripted import gateway_app, register

TEXTS = ("Once upon a time there", "The capital of France is Paris", "a b")
SCORE = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}  # as its local-completions


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base()


@pytest.fixture(scope="module")
def adapter(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> TestAdapter:
    config = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"])
    return make_adapter(base, tmp_path_factory.mktemp("adapters") / "tone", config, seed=4, std=0.12)


@pytest.fixture(scope="module")
def oracle(base: BaseModel, adapter: TestAdapter) -> Oracle:
    return Oracle(base, [adapter])


@pytest.fixture(scope="module")
def tokenizer(base: BaseModel) -> Any:
    return AutoTokenizer.from_pretrained(base.path)


@pytest.fixture(scope="module")
def client(
    base: BaseModel, adapter: TestAdapter, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[TestClient]:
    url = sqlite_catalog(tmp_path_factory.mktemp("catalog"))
    version = register(Catalog(url), "tone", base.fingerprint)
    served = replace(adapter, ref=replace(adapter.ref, digest=version.digest))
    engine = make_engine(base, [served], max_num_batched_tokens=16, max_num_seqs=8, num_threads=1)
    stream = AsyncEngine(engine)
    stream.start()
    with TestClient(gateway_app(base, url, LocalEngineClient(stream))) as client:
        yield client
    stream.stop()
    engine.check_integrity()


def post(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return dict(response.json())


def parse_logprobs(body: dict[str, Any], context_lengths: Sequence[int]) -> list[tuple[float, bool]]:
    """The harness's parser: the continuation's log-likelihood, and whether greedy decoding would generate it."""
    out = []
    for choice, start in zip(sorted(body["choices"], key=itemgetter("index")), context_lengths, strict=True):
        logprobs = choice["logprobs"]["token_logprobs"][start:-1]
        best = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][start:-1]]
        out.append((sum(logprobs), all(a == b for a, b in zip(logprobs, best, strict=True))))
    return out


@pytest.mark.parametrize("lora", [False, True], ids=["base", "tone"])
def test_loglikelihoods(
    client: TestClient, base: BaseModel, adapter: TestAdapter, oracle: Oracle, tokenizer: Any, lora: bool
) -> None:
    model, reference = ("tone", adapter) if lora else (base.name, None)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    greedy = prompts[0] + [int(oracle.logits(prompts[0], reference)[-1].argmax())]
    prompts.append(greedy)
    starts = [4, 10, 1, len(greedy) - 1]
    body = post(client, model=model, prompt=prompts, **SCORE)
    got = parse_logprobs(body, starts)
    for (logprob, is_greedy), ids, start in zip(got, prompts, starts, strict=True):
        expected = oracle.logits(ids[:-1], reference).log_softmax(-1)[start - 1 :]
        continuation = torch.tensor(ids[start:])
        assert logprob == pytest.approx(float(expected.gather(1, continuation[:, None]).sum()), abs=1e-3)
        assert is_greedy == bool((expected.argmax(-1) == continuation).all())
    assert got[-1][1]
    assert not got[0][1]
    num_prompt_tokens = sum(map(len, prompts))
    assert body["usage"]["prompt_tokens"] == num_prompt_tokens
    assert body["usage"]["completion_tokens"] == len(prompts)


def test_rolling_loglikelihood_generates_nothing(
    client: TestClient, base: BaseModel, oracle: Oracle, tokenizer: Any
) -> None:
    body = post(client, model=base.name, prompt=list(TEXTS), max_tokens=0, echo=True, logprobs=0)
    assert body["usage"]["completion_tokens"] == 0
    for choice, text in zip(body["choices"], TEXTS, strict=True):
        ids = tokenizer(text)["input_ids"]
        logprobs = choice["logprobs"]
        expected = oracle.logits(ids, None).log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:])[:, None])
        assert choice["text"] == text == "".join(logprobs["tokens"])
        assert choice["finish_reason"] == "length"
        assert logprobs["token_logprobs"][0] is None
        assert logprobs["token_logprobs"][1:] == pytest.approx(expected.flatten().tolist(), abs=1e-4)
        assert logprobs["text_offset"] == list(range(len(text)))  # a byte is a token
        assert [list(top) for top in logprobs["top_logprobs"][1:]] == [[t] for t in logprobs["tokens"][1:]]


def test_generate_until(client: TestClient, base: BaseModel) -> None:
    fields = {"model": base.name, "prompt": [TEXTS[0]], "temperature": 0, "max_tokens": 24, "seed": 1234}
    text = post(client, **fields)["choices"][0]["text"]
    stop = text[6:8]
    assert post(client, **fields, stop=[stop, "<|im_end|>"])["choices"][0]["text"] == text[: text.index(stop)]


def test_an_echo_comes_first_in_a_stream_and_once_for_each_choice(client: TestClient, base: BaseModel) -> None:
    fields = {"model": base.name, "prompt": list(TEXTS[:2]), "n": 2, "seed": 7, "max_tokens": 4, "echo": True}
    fields |= {"logprobs": 1, "ignore_eos": True}
    whole = post(client, **fields)
    response = client.post("/v1/completions", json=fields | {"stream": True})
    texts, logprobs = [""] * 4, [[] for _ in range(4)]  # type: ignore[var-annotated]
    for event in response.text.split("\n\n")[:-2]:
        (choice,) = json.loads(event.removeprefix("data: "))["choices"]
        texts[choice["index"]] += choice["text"]
        logprobs[choice["index"]] += choice["logprobs"]["token_logprobs"]
    for i, choice in enumerate(whole["choices"]):
        assert choice["text"].startswith(TEXTS[i // 2])
        assert texts[i] == choice["text"]
        assert logprobs[i] == pytest.approx(choice["logprobs"]["token_logprobs"], abs=1e-4)
        assert len(logprobs[i]) == len(TEXTS[i // 2]) + 4
    assert whole["choices"][0]["text"] != whole["choices"][1]["text"]
    assert whole["usage"]["prompt_tokens"] == len(TEXTS[0]) + len(TEXTS[1])
    alone = post(client, **fields | {"prompt": TEXTS[1], "n": 1, "seed": 8})
    assert alone["choices"][0]["text"] == whole["choices"][3]["text"]


def test_prompt_logprobs_as_vllm_sends_them(client: TestClient, oracle: Oracle, adapter: TestAdapter) -> None:
    body = post(client, model="tone", prompt=[5, 6, 7], max_tokens=1, prompt_logprobs=2, echo=True, logprobs=0)
    (choice,) = body["choices"]
    first, *rest = choice["prompt_logprobs"]
    assert first is None
    expected = oracle.logits([5, 6], adapter).log_softmax(-1)
    for row, token, entries in zip(expected, (6, 7), rest, strict=True):
        assert entries[str(token)]["logprob"] == pytest.approx(float(row[token]), abs=1e-4)
        assert entries[str(token)]["rank"] == int((row > row[token]).sum()) + 1
        assert set(entries) == {str(token), *map(str, row.topk(2).indices.tolist())}
    assert [len(top) for top in choice["logprobs"]["top_logprobs"][1:]] == [1, 1, 1]
    chat = {"model": "tone", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, "prompt_logprobs": 0}
    answer = client.post("/v1/chat/completions", json=chat).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert "prompt_logprobs" not in post(client, model="tone", prompt="a", max_tokens=1, echo=True)["choices"][0]


def test_a_prompt_may_fill_the_context_where_nothing_follows(client: TestClient, base: BaseModel) -> None:
    fields = {"model": base.name, "prompt": "x" * 512, "echo": True, "logprobs": 0}
    assert len(post(client, **fields, max_tokens=0)["choices"][0]["logprobs"]["tokens"]) == 512
    assert client.post("/v1/completions", json=fields | {"max_tokens": 1}).status_code == 400
    alien = client.post("/v1/completions", json=fields | {"prompt": [5, 2**40], "max_tokens": 0})
    assert (alien.status_code, alien.json()["error"]["param"]) == (400, "prompt")
    over = client.post("/v1/completions", json=fields | {"prompt": "x" * 513, "max_tokens": 0})
    assert over.json()["error"]["code"] == "context_length_exceeded"
