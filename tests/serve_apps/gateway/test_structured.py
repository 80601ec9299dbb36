"""Structured output through HTTP, with the official openai client and a real engine on a tiny base, without Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import httpx
import openai
import pydantic
import pytest

from loray.bases.registry import BaseModel
from loray.engine.build import build_engine
from loray.engine.stream import EngineStream
from loray.spec import ServeSpec
from serve_apps.standalone.engines import LocalEngines
from tests.serve_apps.gateway.scripted import catalog_url, gateway_app

CHAT: Any = [{"role": "user", "content": "hi"}]
# A hot random model leaves a run of spaces, which JSON allows, after a few tokens.
SAMPLED: Any = {"temperature": 2.0, "seed": 1, "max_tokens": 400}


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Item(pydantic.BaseModel):
    colour: Colour
    number: int = pydantic.Field(ge=0, le=99)
    other: list[bool] = pydantic.Field(max_length=2)


@pytest.fixture(scope="module")
def engine(base: BaseModel) -> Iterator[EngineStream]:
    def no_adapters(ref: Any) -> Any:
        raise AssertionError(ref)

    spec = ServeSpec(base=base.name, dtype="float32", pool_bytes=8 << 20, max_num_seqs=8)
    stream = EngineStream(build_engine(spec, base, no_adapters))
    stream.start()
    yield stream
    stream.stop()


Use = Callable[[openai.AsyncOpenAI], Coroutine[Any, Any, None]]


@pytest.fixture
def with_client(base: BaseModel, engine: EngineStream, tmp_path: Path) -> Callable[[Use], None]:
    def run(use: Use) -> None:
        async def main() -> None:
            app = gateway_app(base, catalog_url(tmp_path), LocalEngines(engine))
            async with (
                app.router.lifespan_context(app),
                httpx.AsyncClient(transport=httpx.ASGITransport(app)) as http,
                openai.AsyncOpenAI(
                    base_url="http://test/v1", api_key="none", http_client=http, max_retries=0
                ) as client,
            ):
                await use(client)

        asyncio.run(main())

    return run


def test_the_clients_parse_gives_an_object(with_client: Callable[[Use], None], base: BaseModel) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        parsed = await client.chat.completions.parse(model=base.name, messages=CHAT, response_format=Item, **SAMPLED)
        (choice,) = parsed.choices
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, Item)
        async with client.chat.completions.stream(
            model=base.name, messages=CHAT, response_format=Item, **SAMPLED
        ) as stream:
            final = await stream.get_final_completion()
        assert final.choices[0].message.parsed == choice.message.parsed

    with_client(use)


def test_json_mode_and_vllms_fields(with_client: Callable[[Use], None], base: BaseModel) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        chat = await client.chat.completions.create(
            model=base.name, messages=CHAT, response_format={"type": "json_object"}, n=3, **SAMPLED
        )
        for choice in chat.choices:
            assert (choice.message.content or "").startswith("{")
            if choice.finish_reason == "stop":
                assert isinstance(json.loads(choice.message.content or ""), dict)
        for body in ({"guided_choice": ["yes", "no"]}, {"structured_outputs": {"choice": ["yes", "no"]}}):
            done = await client.completions.create(model=base.name, prompt="x", extra_body=body, n=4, **SAMPLED)
            assert {c.text for c in done.choices} <= {"yes", "no"}
            assert {c.finish_reason for c in done.choices} == {"stop"}
        body = {"structured_outputs": {"regex": r"\d{3}-\d{2}"}}
        done = await client.completions.create(model=base.name, prompt=["x", "y"], extra_body=body, **SAMPLED)
        assert all(len(c.text) == 6 and c.text[3] == "-" for c in done.choices)
        body = {"guided_grammar": 'root ::= "SELECT " ("a" | "b")'}
        done = await client.completions.create(model=base.name, prompt="x", extra_body=body, **SAMPLED)
        assert done.choices[0].text in ("SELECT a", "SELECT b")

    with_client(use)


def test_bad_words_and_allowed_tokens(with_client: Callable[[Use], None], base: BaseModel) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        allowed = {"allowed_token_ids": [64, 65, 66], "ignore_eos": True}
        fields: Any = {"model": base.name, "prompt": "x", "temperature": 2.0, "max_tokens": 200, "seed": 3}
        free = (await client.completions.create(**fields, extra_body=allowed)).choices[0].text
        letters = sorted(set(free))
        assert len(letters) == 3
        word = letters[0] + letters[1]
        assert word in free
        held = await client.completions.create(**fields, extra_body=allowed | {"bad_words": [word, letters[2]]})
        text = held.choices[0].text
        assert set(text) == {letters[0], letters[1]}
        assert word not in text

    with_client(use)


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json", "uniqueItems"),
        ({"guided_regex": "("}, "guided_regex", "regular expression cannot be enforced"),
        ({"structured_outputs": {"grammar": "start: a"}}, "structured_outputs.grammar", "grammar cannot be enforced"),
        ({"guided_json": {}, "guided_regex": "a"}, "guided_json", "one constraint only"),
        (
            {"guided_json": {"allOf": [{"anyOf": [{"properties": {f"{k}{i}": {}}} for k in "ab"]} for i in range(20)]}},
            "guided_json",
            "too large",
        ),
        ({"guided_choice": [f"option {i}" for i in range(10_000)]}, "guided_choice", "characters"),
    ],
)
def test_refusals_name_the_field(
    with_client: Callable[[Use], None], base: BaseModel, body: dict[str, Any], param: str, message: str
) -> None:
    async def use(client: openai.AsyncOpenAI) -> None:
        with pytest.raises(openai.BadRequestError) as raised:
            await client.completions.create(model=base.name, prompt="x", extra_body=body)
        assert raised.value.param == param
        assert message in raised.value.message

    with_client(use)
