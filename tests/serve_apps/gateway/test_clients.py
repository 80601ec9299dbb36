"""Clients unmodified against the gateway: openai's, and the requests and parser of lm-evaluation-harness."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

import openai
import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from peft import LoraConfig
from transformers import AutoTokenizer

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.engine.async_engine import AsyncEngine
from loray.errors import EngineError, Overloaded
from serve_apps.standalone.server import LocalEngineClient
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.engines import make_engine
from tests.fixtures.gateway import CHAT, HELLO, ScriptedEngines, delta, error_of, gateway_app, openai_of, register
from tests.fixtures.peft_adapters import Oracle, TestAdapter, make_adapter

AppOf = Callable[..., FastAPI]
TEXTS = ("Once upon a time there", "The capital of France is Paris", "a b")
SCORE = {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}  # as its local-completions


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
def real(
    base: BaseModel, adapter: TestAdapter, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, AsyncEngine]]:
    """A catalog with `tone`, and an engine that has it."""
    url = sqlite_catalog(tmp_path_factory.mktemp("catalog"))
    version = register(Catalog(url), "tone", base.fingerprint)
    served = replace(adapter, ref=replace(adapter.ref, digest=version.digest))
    engine = make_engine(base, [served], max_num_batched_tokens=16, max_num_seqs=8, num_threads=1)
    stream = AsyncEngine(engine)
    stream.start()
    yield url, stream
    stream.stop()
    engine.check_integrity()


@pytest.fixture(scope="module")
def app_of(base: BaseModel, real: tuple[str, AsyncEngine]) -> AppOf:
    """A gateway of the real engine, or of others."""
    url, stream = real
    return lambda engines=None: gateway_app(base, url, engines or LocalEngineClient(stream))


@pytest.fixture(scope="module")
def client(app_of: AppOf) -> Iterator[TestClient]:
    with TestClient(app_of()) as client:
        yield client


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
    (cut,) = post(client, **fields, stop=[stop, "<|im_end|>"])["choices"]
    assert (cut["text"], cut["finish_reason"]) == (text[: text.index(stop)], "stop")


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
    chat = {"model": "tone", "messages": CHAT, "max_tokens": 1, "prompt_logprobs": 0}
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


async def test_vllms_sampling_fields(app_of: AppOf, base: BaseModel) -> None:
    async with openai_of(app_of()) as client:

        async def complete(**fields: Any) -> Any:
            known = {name: fields.pop(name) for name in ("stop", "logit_bias", "logprobs") if name in fields}
            body = {"ignore_eos": True} | fields
            answer = await client.completions.create(
                model=base.name, prompt="abc", temperature=0, max_tokens=30, extra_body=body, **known
            )
            return answer.choices[0]

        free = await complete()
        stop = next(c for c in free.text[3:] if c.isascii() and c != free.text[0])
        cut = await complete(stop=stop, include_stop_str_in_output=True)
        assert cut.text == free.text[: free.text.index(stop) + 1]
        assert cut.stop_reason == stop
        scored = await complete(prompt_logprobs=0)
        assert scored.text == free.text
        assert [len(entry or ()) for entry in scored.prompt_logprobs] == [0, 1, 1]  # the client keeps what it finds
        forced = await complete(logit_bias={"70": 100})
        assert set(forced.text) == {chr(70 + 33)}
        ended = await complete(logit_bias={"70": 100}, stop_token_ids=[70])
        assert (ended.text, ended.finish_reason, ended.stop_reason) == ("", "stop", 70)
        known = await complete(return_token_ids=True, logprobs=1, return_tokens_as_token_ids=True)
        assert known.prompt_token_ids == [64, 65, 66]
        assert known.logprobs.tokens == [f"token_id:{t}" for t in known.token_ids]
        assert (await complete(truncate_prompt_tokens=2, return_token_ids=True)).prompt_token_ids == [65, 66]
        later = await complete(logit_bias={"70": 100}, stop_token_ids=[70], min_tokens=4, logprobs=0)
        assert (len(later.logprobs.tokens), later.finish_reason) == (5, "stop")
        varied = await complete(repetition_penalty=5.0)
        assert len(set(varied.text)) > len(set(forced.text))


async def test_an_echo_and_streamed_choices(app_of: AppOf, base: BaseModel) -> None:
    async with openai_of(app_of()) as client:
        scored = await client.completions.create(
            model=base.name, prompt="abc", echo=True, max_tokens=0, logprobs=1, temperature=0
        )
        logprobs = scored.choices[0].logprobs
        assert scored.choices[0].text == "abc"
        assert logprobs.tokens == ["a", "b", "c"]
        assert logprobs.token_logprobs[0] is None
        assert all(lp < 0 for lp in logprobs.token_logprobs[1:])
        fields: Any = {"model": base.name, "messages": CHAT, "n": 3, "seed": 1, "max_tokens": 6}
        whole = await client.chat.completions.create(**fields)
        texts = [""] * 3
        async for chunk in await client.chat.completions.create(**fields, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.delta.content or ""
        assert texts == [c.message.content for c in whole.choices]
        assert len(set(texts)) == 3
        chat = await client.chat.completions.create(
            model=base.name, messages=CHAT, logprobs=True, top_logprobs=3, temperature=0, max_tokens=8
        )
        content = chat.choices[0].logprobs.content
        assert all(len(t.top_logprobs) == 3 and t.token == t.top_logprobs[0].token for t in content)  # greedy
        assert whole.usage.completion_tokens <= 18 < whole.usage.prompt_tokens * 3


async def test_a_response(app_of: AppOf, client_of: Any, base: BaseModel) -> None:
    engines = ScriptedEngines(HELLO)
    async with openai_of(app_of(engines)) as client:
        asked = {"instructions": "be brief", "input": "hi", "max_output_tokens": 9, "temperature": 0}
        response = await client.responses.create(model=base.name, **asked, metadata={"a": "b"})
        assert response.output_text == "hello"
        assert (response.status, response.metadata, response.store) == ("completed", {"a": "b"}, False)
        assert (response.usage.input_tokens, response.usage.output_tokens) == (len(engines.requests[0].prompt_ids), 6)
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    with client_of(engines) as client:
        client.chat(messages=chat, max_tokens=9)
    of_response, of_chat = engines.requests
    assert of_response.prompt_ids == of_chat.prompt_ids
    assert (of_response.params.max_tokens, of_response.params.temperature) == (9, 0.0)


async def test_a_stream(app_of: AppOf, base: BaseModel) -> None:
    async with openai_of(app_of(ScriptedEngines(HELLO))) as client:
        async with client.responses.stream(model=base.name, input=CHAT) as stream:
            events = [event async for event in stream]
            final = await stream.get_final_response()
        begins = ["created", "in_progress", "output_item.added", "content_part.added"]
        assert [e.type for e in events][:4] == [f"response.{name}" for name in begins]
        assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == "hello"
        assert final.output_text == "hello"
        plain = await client.responses.create(model=base.name, input="hi", stream=True)
        assert [e.type async for e in plain][-1] == "response.completed"


def test_events_have_their_type_and_no_end_mark(client_of: Any, base: BaseModel) -> None:
    with client_of(ScriptedEngines(HELLO)) as client:
        response = client.post("/v1/responses", json={"model": base.name, "input": "hi", "stream": True})
    first, *_, last = response.text.removesuffix("\n\n").split("\n\n")
    assert first.startswith("event: response.created\ndata: {")
    assert last.startswith("event: response.completed\ndata: {")


async def test_an_answer_at_its_limit(app_of: AppOf, base: BaseModel) -> None:
    async with openai_of(app_of(ScriptedEngines([delta("he", "length")]))) as client:
        response = await client.responses.create(model=base.name, input="hi", max_output_tokens=2)
        assert response.status == "incomplete"
        assert response.incomplete_details.reason == "max_output_tokens"


async def test_errors(app_of: AppOf, client_of: Any, base: BaseModel) -> None:
    async with openai_of(app_of(ScriptedEngines(HELLO))) as client:
        with pytest.raises(openai.NotFoundError):
            await client.responses.create(model="nobody", input="hi")
        with pytest.raises(openai.BadRequestError) as unsupported:
            await client.responses.create(model=base.name, input="hi", previous_response_id="resp_1")
        assert unsupported.value.param == "previous_response_id"
        with pytest.raises(openai.BadRequestError) as long:
            await client.responses.create(model=base.name, input="x" * 600)
        assert (long.value.param, long.value.code) == ("input", "context_length_exceeded")
        with pytest.raises(openai.BadRequestError) as empty:
            await client.responses.create(model=base.name, input=[])
        assert empty.value.param == "input"
    with client_of(ScriptedEngines([Overloaded("full", 1)])) as client:
        error_of(client.post("/v1/responses", json={"model": base.name, "input": "hi", "stream": True}), 429)


async def test_a_failure_in_the_middle_is_the_last_event(app_of: AppOf, base: BaseModel) -> None:
    async with openai_of(app_of(ScriptedEngines([delta("a"), EngineError("the replica was lost")]))) as client:
        events = [e async for e in await client.responses.create(model=base.name, input="hi", stream=True)]
        last = events[-1]
        assert last.type == "response.failed"
        assert (last.response.error.code, last.response.error.message) == ("server_error", "the replica was lost")
        assert last.response.output_text == "a"
