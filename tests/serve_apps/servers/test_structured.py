"""Structured output from both servers: by adapters, beside other requests, and what is refused."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field

from loray.catalog import AdapterVersion
from tests.fixtures.asking import CHAT, GREEDY, answer

HOT: dict[str, Any] = {"messages": CHAT, "temperature": 2.0, "seed": 1, "max_tokens": 300}


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Item(BaseModel):
    colour: Colour
    number: int = Field(ge=0, le=99)
    other: list[bool] = Field(max_length=2)


def test_the_clients_parse(client: openai.OpenAI, tone: list[AdapterVersion]) -> None:
    for model in ("tiny", tone[0].label):
        parsed = client.chat.completions.parse(model=model, response_format=Item, **HOT).choices[0]
        assert parsed.finish_reason == "stop"
        assert isinstance(parsed.message.parsed, Item)


def test_streams_are_held_to_it_beside_others_that_are_not(client: openai.OpenAI, tone: list[AdapterVersion]) -> None:
    plain = answer(client, tone[0].label)

    def held(seed: int) -> str:
        body = {"structured_outputs": {"json": {"enum": [{"a": [1, 2]}, "b", 3]}, "disable_any_whitespace": True}}
        stream = client.chat.completions.create(
            model=tone[seed % 3].label, stream=True, extra_body=body, **HOT | {"seed": seed}
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)

    with ThreadPoolExecutor(4) as threads:
        texts = [threads.submit(held, seed) for seed in range(8)]
        others = [threads.submit(answer, client, tone[0].label) for _ in range(4)]
        assert all(json.loads(t.result()) in ({"a": [1, 2]}, "b", 3) for t in texts)
        assert {o.result() for o in others} == {plain}


def test_bad_words_and_allowed_tokens(client: openai.OpenAI) -> None:
    allowed = {"allowed_token_ids": [64, 65, 66], "ignore_eos": True}
    fields: Any = {"model": "tiny", "prompt": "x", "temperature": 2.0, "max_tokens": 200, "seed": 3}
    free = client.completions.create(**fields, extra_body=allowed).choices[0].text
    letters = sorted(set(free))
    assert len(letters) == 3
    word = letters[0] + letters[1]
    assert word in free
    held = client.completions.create(**fields, extra_body=allowed | {"bad_words": [word, letters[2]]}).choices[0].text
    assert set(held) == {letters[0], letters[1]}
    assert word not in held


EXPLODING = {"allOf": [{"anyOf": [{"properties": {f"{k}{i}": {"type": "null"}}} for k in "ab"]} for i in range(20)]}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"guided_json": EXPLODING}, "guided_json", "too large"),
        ({"guided_json": {"$ref": "#"}}, "guided_json", "no answer can match"),
        ({"guided_json": {"type": "array", "uniqueItems": True}}, "guided_json", "uniqueItems"),
        ({"guided_regex": "("}, "guided_regex", "regular expression cannot be enforced"),
        ({"guided_regex": "(" * 50_000}, "guided_regex", "nest"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "one constraint only"),
        ({"structured_outputs": {"choice": ["x" * 70_000]}}, "structured_outputs.choice.0", "characters"),
        ({"structured_outputs": {"grammar": "start: a"}}, "structured_outputs.grammar", "grammar cannot be enforced"),
    ],
)
def test_what_cannot_be_held_is_refused(client: openai.OpenAI, body: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        client.chat.completions.create(model="tiny", extra_body=body, **HOT)
    assert refused.value.param == param
    assert client.chat.completions.create(model="tiny", messages=CHAT, **GREEDY).choices[0].finish_reason == "length"
