"""Structured output from both servers, in the forms in which vLLM's documentation asks for it."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from enum import StrEnum
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from loray.catalog import AdapterVersion
from tests.serve_apps.asking import CHAT, GREEDY, answer

HOT: dict[str, Any] = {"messages": CHAT, "temperature": 2.0, "seed": 1, "max_tokens": 300}
SQL = """
root ::= select_statement
select_statement ::= "SELECT " column " from " table " where " condition
column ::= "col_1 " | "col_2 "
table ::= "table_1 " | "table_2 "
condition ::= column "= " number
number ::= "1 " | "2 "
"""


class CarType(StrEnum):
    SEDAN = "sedan"
    SUV = "SUV"


class Car(BaseModel):
    car_type: CarType
    doors: int


def ask(client: openai.OpenAI, model: str = "tiny", **fields: Any) -> Any:
    return client.chat.completions.create(model=model, **HOT | fields).choices[0]


def test_vllms_examples(client: openai.OpenAI) -> None:
    schema = Car.model_json_schema() | {"additionalProperties": False}
    email = {"regex": r"[a-z0-9.]{1,20}@\w{6,10}\.com\n"}
    assert ask(client, extra_body={"structured_outputs": {"choice": ["positive", "negative"]}}).message.content in (
        "positive",
        "negative",
    )
    text = ask(client, extra_body={"structured_outputs": email}, stop=["\n"]).message.content
    assert re.fullmatch(r"[a-z0-9.]{1,20}@\w{6,10}\.com", text, re.ASCII)
    named = {"type": "json_schema", "json_schema": {"name": "car-description", "schema": schema}}
    for fields in ({"response_format": named}, {"extra_body": {"guided_json": schema}}):
        choice = ask(client, **fields)
        assert choice.finish_reason == "length" or Car.model_validate_json(choice.message.content)
    assert re.fullmatch(
        r"SELECT col_[12]  from table_[12]  where col_[12] = [12] ",
        ask(client, extra_body={"structured_outputs": {"grammar": SQL}}).message.content,
    )
    tag = {"begin": "<function=f>", "schema": {"type": "object"}, "end": "</function>"}
    tags = {"type": "structural_tag", "structures": [tag], "triggers": ["<function="]}
    assert ask(client, response_format=tags, max_tokens=20).finish_reason in ("length", "stop")


def test_the_clients_parse(client: openai.OpenAI, tone: list[AdapterVersion]) -> None:
    compact = {"structured_outputs": {"json": Car.model_json_schema(), "disable_any_whitespace": True}}
    for model in ("tiny", tone[0].label):
        choice = ask(client, model, extra_body=compact)
        assert choice.finish_reason == "length" or Car.model_validate_json(choice.message.content)
        parsed = client.chat.completions.parse(model=model, response_format=Flag, **HOT).choices[0]
        assert parsed.finish_reason == "stop"
        assert isinstance(parsed.message.parsed, Flag)


class Flag(BaseModel):
    flag: bool


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


EXPLODING = {"allOf": [{"anyOf": [{"properties": {f"{k}{i}": {"type": "null"}}} for k in "ab"]} for i in range(20)]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"guided_json": EXPLODING}, "too large"),
        ({"guided_regex": "(" * 50_000}, "nest"),
        ({"structured_outputs": {"choice": ["x" * 70_000]}}, "characters"),
        ({"guided_json": {"$ref": "#"}}, "no answer can match"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "one constraint only"),
    ],
)
def test_what_cannot_be_held_is_refused(client: openai.OpenAI, body: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, extra_body=body)
    assert client.chat.completions.create(model="tiny", messages=CHAT, **GREEDY).choices[0].finish_reason == "length"
