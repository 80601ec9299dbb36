"""The official openai client, unmodified, against the gateway on a real engine with a tiny base, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from loray.bases.registry import BaseModel
from loray.engine.async_engine import AsyncEngine
from loray.engine.build import build_engine
from loray.spec import ServeSpec
from serve_apps.standalone.server import LocalEngineClient
from tests.fixtures.catalogs import sqlite_catalog
from tests.serve_apps.gateway.scripted import gateway_app

CHAT: Any = [{"role": "user", "content": "hi"}]
GREEDY: Any = {"temperature": 0, "max_tokens": 8, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base()


@pytest.fixture(scope="module")
def engine(base: BaseModel) -> Iterator[AsyncEngine]:
    spec = ServeSpec(base=base.name, dtype="float32", pool_bytes=4 << 20, max_num_seqs=8)

    def no_adapters(ref: Any) -> Any:
        raise AssertionError(ref)

    stream = AsyncEngine(build_engine(spec, base, no_adapters))
    stream.start()
    yield stream
    stream.stop()


@pytest.fixture
def with_client(base: BaseModel, engine: AsyncEngine, tmp_path: Path) -> Callable[..., Any]:
    def run(use: Callable[[openai.AsyncOpenAI], Coroutine[Any, Any, Any]]) -> Any:
        async def main() -> Any:
            app = gateway_app(base, sqlite_catalog(tmp_path), LocalEngineClient(engine))
            async with app.router.lifespan_context(app), _client(app) as client:
                return await use(client)

        return asyncio.run(main())

    return run


@asynccontextmanager
async def _client(app: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    transport = httpx.ASGITransport(app)
    async with (
        httpx.AsyncClient(transport=transport) as http,
        openai.AsyncOpenAI(base_url="http://test/v1", api_key="none", http_client=http, max_retries=0) as client,
    ):
        yield client


def test_streamed_and_whole_answers_agree(with_client: Any, base: BaseModel) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        whole = await client.chat.completions.create(model=base.name, messages=CHAT, **GREEDY)
        stream = await client.chat.completions.create(
            model=base.name, messages=CHAT, stream=True, stream_options={"include_usage": True}, **GREEDY
        )
        chunks = [c async for c in stream]
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        assert text == whole.choices[0].message.content
        assert whole.usage is not None
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.total_tokens == whole.usage.total_tokens
        assert whole.usage.completion_tokens == 8
        assert whole.choices[0].finish_reason == "length"
        plain = await client.completions.create(model=base.name, prompt="abc", **GREEDY)
        parts = [c async for c in await client.completions.create(model=base.name, prompt="abc", stream=True, **GREEDY)]
        assert "".join(p.choices[0].text for p in parts) == plain.choices[0].text

    with_client(use)


def test_choices_prompts_and_seeds(with_client: Any, base: BaseModel) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        two = await client.completions.create(model=base.name, prompt=["abc", "xyz"], n=2, seed=3, max_tokens=8)
        again = await client.completions.create(model=base.name, prompt="abc", seed=4, max_tokens=8)
        assert [c.index for c in two.choices] == [0, 1, 2, 3]
        assert two.choices[1].text == again.choices[0].text
        assert two.choices[0].text != two.choices[1].text

    with_client(use)


def test_logprobs_of_both_endpoints(with_client: Any, base: BaseModel) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        chat = await client.chat.completions.create(
            model=base.name, messages=CHAT, logprobs=True, top_logprobs=3, **GREEDY
        )
        content = chat.choices[0].logprobs.content  # type: ignore[union-attr]
        assert content is not None
        assert len(content) == 8
        assert all(len(t.top_logprobs) == 3 and t.token == t.top_logprobs[0].token for t in content)  # greedy
        plain = await client.completions.create(model=base.name, prompt="abc", logprobs=2, **GREEDY)
        logprobs = plain.choices[0].logprobs
        assert logprobs is not None
        assert logprobs.tokens is not None
        assert len(logprobs.tokens) == len(logprobs.token_logprobs or ()) == 8

    with_client(use)


def test_stop_strings(with_client: Any, base: BaseModel) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        whole = await client.completions.create(
            model=base.name, prompt="abc", temperature=0, max_tokens=30, extra_body={"ignore_eos": True}
        )
        text = whole.choices[0].text
        stop = next(c for c in text[3:] if c.isascii())
        cut = await client.completions.create(
            model=base.name, prompt="abc", temperature=0, max_tokens=30, stop=stop, extra_body={"ignore_eos": True}
        )
        assert cut.choices[0].text == text[: text.index(stop)]
        assert cut.choices[0].finish_reason == "stop"

    with_client(use)


def test_vllms_sampling_fields(with_client: Any, base: BaseModel) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
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

    with_client(use)


def test_an_echo_and_streamed_choices(with_client: Any, base: BaseModel) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        scored = await client.completions.create(
            model=base.name, prompt="abc", echo=True, max_tokens=0, logprobs=1, temperature=0
        )
        logprobs = scored.choices[0].logprobs
        assert scored.choices[0].text == "abc"
        assert logprobs is not None
        assert logprobs.tokens == ["a", "b", "c"]
        assert logprobs.token_logprobs is not None
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
        assert whole.usage is not None
        assert whole.usage.completion_tokens <= 18 < whole.usage.prompt_tokens * 3

    with_client(use)


def test_errors_are_the_clients_own(with_client: Any, base: BaseModel) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.NotFoundError) as missing:
            await client.chat.completions.create(model="nobody", messages=CHAT)
        assert missing.value.code == "model_not_found"
        with pytest.raises(openai.BadRequestError, match="maximum context length is 512") as long:
            await client.completions.create(model=base.name, prompt="x" * 600)
        assert long.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="vocabulary") as token:
            await client.completions.create(model=base.name, prompt=[5000])
        assert token.value.param == "prompt"
        assert [m.id async for m in client.models.list()] == [base.name]
        assert (await client.models.retrieve(base.name)).id == base.name

    with_client(use)
