"""Requests as vLLM's documentation and examples make them: structured output, tools, reasoning off."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from enum import StrEnum
from typing import Any

import openai
import pytest
from pydantic import BaseModel

MODEL = "tiny"
CHAT: Any = [{"role": "user", "content": "hi"}]
# A hot random model leaves a run of spaces, which JSON allows, after a few tokens.
HOT: Any = {"model": MODEL, "temperature": 2.0, "seed": 1, "max_tokens": 150}
EMAIL = r"[a-z0-9.]{1,20}@\w{6,10}\.com\n"
GBNF = """
root ::= statement

statement ::= "INSERT " field "into " table "where " condition

field ::= "left " | "right "

table ::= "first " | "second "

condition ::= field "= " number

number ::= "1 " | "2 "
"""
LARK = """
    ?start: statement

    ?statement: "INSERT " fields " INTO " name

    ?fields: name ("," name)*

    ?name: /[a-zA-Z_][a-zA-Z0-9_]{0,9}/
"""


class Kind(StrEnum):
    BOAT = "BOAT"
    kite = "Kite"


class Toy(BaseModel):
    kind: Kind
    wheels: bool


SCHEMA = Toy.model_json_schema()
TAGS: Any = {
    "type": "structural_tag",
    "structures": [{"begin": "<function=paint>", "schema": SCHEMA, "end": "</function>"}],
    "triggers": ["<function="],
}


def matches(pattern: str) -> Callable[[str], object]:
    return lambda text: re.fullmatch(pattern, text, re.ASCII)


def is_object(text: str) -> bool:
    return isinstance(json.loads(text), dict)


def json_schema(**fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "toy-description", **fields}}}


SENTIMENT = matches("positive|negative")
ADDRESS = matches(EMAIL)
INSERT = matches(r"INSERT (left|right) into (first|second) where (left|right) = [12] ")
INSERT_INTO = matches(r"INSERT \w+(,\w+)* INTO \w+")
ANY = matches("(?s).*")
FORMS: dict[str, tuple[dict[str, Any], Callable[[str], object]]] = {
    "choice": ({"structured_outputs": {"choice": ["positive", "negative"]}}, SENTIMENT),
    "regex": ({"structured_outputs": {"regex": EMAIL}}, ADDRESS),
    "regex-stop": ({"structured_outputs": {"regex": EMAIL}, "stop": ["\n"]}, matches(EMAIL.removesuffix(r"\n"))),
    "json": ({"structured_outputs": {"json": SCHEMA}}, Toy.model_validate_json),
    "json-text": ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, Toy.model_validate_json),
    "json-compact": ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, Toy.model_validate_json),
    "json-fallback": ({"structured_outputs": {"json": SCHEMA, "disable_fallback": True}}, Toy.model_validate_json),
    "json-object": ({"structured_outputs": {"json_object": True}}, is_object),
    "grammar": ({"structured_outputs": {"grammar": GBNF}}, INSERT),
    "grammar-lark": ({"structured_outputs": {"grammar": LARK}}, INSERT_INTO),
    "structural-tag": ({"structured_outputs": {"structural_tag": json.dumps(TAGS)}}, ANY),
    "format-tag": ({"response_format": TAGS}, ANY),
    "format-schema": (json_schema(schema=SCHEMA), Toy.model_validate_json),
    "format-strict": (json_schema(schema=SCHEMA, strict=True, description="a toy"), Toy.model_validate_json),
    "format-object": ({"response_format": {"type": "json_object"}}, is_object),
    "format-text": ({"response_format": {"type": "text"}}, ANY),
    "guided-choice": ({"guided_choice": ["positive", "negative"]}, SENTIMENT),
    "guided-regex": ({"guided_regex": EMAIL}, ADDRESS),
    "guided-json": (
        {"guided_json": SCHEMA, "guided_decoding_backend": "xgrammar:no-fallback"},
        Toy.model_validate_json,
    ),
    "guided-space": ({"guided_json": SCHEMA, "guided_whitespace_pattern": " ?"}, Toy.model_validate_json),
    "guided-grammar": ({"guided_grammar": LARK}, INSERT_INTO),
    "guided-tag": ({"structural_tag": json.dumps(TAGS)}, ANY),
}


@pytest.mark.parametrize("name", FORMS)
def test_structured_output(client: openai.OpenAI, name: str) -> None:
    """Of a chat, of a chat's stream and of completions."""
    fields, holds = FORMS[name]
    chat = client.chat.completions.create(messages=CHAT, extra_body=fields, **HOT).choices[0]
    chunks = client.chat.completions.create(messages=CHAT, extra_body=fields, stream=True, **HOT)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == chat.message.content
    for choice in client.completions.create(prompt=["a", "b"], extra_body=fields, **HOT).choices:
        assert choice.finish_reason == "length" or holds(choice.text)
    assert chat.message.content is not None
    assert chat.finish_reason == "length" or holds(chat.message.content)


WEATHER: dict[str, Any] = {
    "name": "weather",
    "description": "The weather at a place",
    "parameters": {
        "type": "object",
        "properties": {
            "place": {"type": "string", "enum": ["Ulm", "Rom"], "description": "a town, as 'Ulm'"},
            "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
        },
        "required": ["place", "unit"],
    },
}
FORECAST: dict[str, Any] = {
    "name": "forecast",
    "parameters": {
        "type": "object",
        "properties": {
            "place": {"type": "string", "enum": ["Ulm"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 7},
        },
        "required": ["place", "days"],
        "additionalProperties": False,
    },
    "strict": True,
}
TOOLS: Any = [{"type": "function", "function": function} for function in (WEATHER, FORECAST)]
TALK: Any = [
    {"role": "user", "content": "Hello, how are you?"},
    {"role": "assistant", "content": "Well! What may I do?"},
    {"role": "user", "content": "What is the weather in Ulm, and in the next days?"},
]
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


@pytest.mark.parametrize("choice", [None, "auto", "none", "required", NAMED], ids=str)
def test_tool_calls(client: openai.OpenAI, choice: Any) -> None:
    fields: dict[str, Any] = (
        HOT | {"messages": TALK, "tools": TOOLS} | ({} if choice is None else {"tool_choice": choice})
    )
    whole = client.chat.completions.create(**fields).choices[0]
    calls = whole.message.tool_calls or []
    assert bool(calls) == (whole.finish_reason == "tool_calls") or whole.finish_reason == "length"
    if choice in ("required", NAMED):
        assert calls
        assert choice == "required" or [call.function.name for call in calls] == ["weather"]
    arguments: list[str] = []  # joined as vLLM's examples do it
    for chunk in client.chat.completions.create(**fields, stream=True):
        for delta in chunk.choices[0].delta.tool_calls or ():
            arguments += [""] * (delta.index + 1 - len(arguments))
            arguments[delta.index] += delta.function.arguments or ""
    assert arguments == [call.function.arguments for call in calls]
    answered = [
        {"role": "tool", "tool_call_id": call.id, "name": call.function.name, "content": "rain"} for call in calls
    ]
    messages = [*TALK, {"role": "assistant", "tool_calls": calls}, *answered] if calls else TALK
    last = client.chat.completions.create(**fields | {"messages": messages, "tool_choice": "auto", "stream": False})
    assert last.choices[0].message.role == "assistant"


OFF: list[dict[str, Any]] = [
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"chat_template_kwargs": {"thinking": False}},
    {"include_reasoning": False},
    {"reasoning_effort": "none"},
]


@pytest.mark.parametrize("fields", OFF, ids=str)
def test_reasoning_is_off(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    """A model that does not reason answers as without the field, and its answer has no reasoning."""
    given: Any = {"model": MODEL, "messages": CHAT, "temperature": 0, "max_tokens": 8}
    message = client.chat.completions.create(**given, extra_body=fields).choices[0].message
    assert message.content == client.chat.completions.create(**given).choices[0].message.content
    assert not (message.model_extra or {}).get("reasoning")
    back = [*CHAT, message.to_dict() | {"reasoning": "none"}, *CHAT]
    assert client.chat.completions.create(**given | {"messages": back}, extra_body=fields).choices


def test_the_responses_api_calls_tools(client: openai.OpenAI) -> None:
    """As vLLM's example: the items of the answer and the call's output are the next request's input."""
    tools: Any = [{"type": "function", **function} for function in (WEATHER, FORECAST)]
    given: Any = {
        "model": MODEL,
        "tools": tools,
        "temperature": 2.0,
        "max_output_tokens": 400,
        "reasoning": {"effort": "none"},
        "parallel_tool_calls": False,  # a random model may begin more calls than there are tokens for
    }
    items: list[Any] = [{"role": "user", "content": "What is the weather in Ulm?"}]
    output = client.responses.create(input=items, tool_choice="required", **given, extra_body={"seed": 1}).output
    items += output
    for call in output:
        assert call.type == "function_call"
        assert json.loads(call.arguments)["place"] in ("Ulm", "Rom")
        items.append({"type": "function_call_output", "call_id": call.call_id, "output": "rain"})
    assert client.responses.create(input=items, **given, extra_body={"top_k": 5}).output
    held = {"structured_outputs": {"choice": ["positive", "negative"]}}
    assert SENTIMENT(client.responses.create(input=items, model=MODEL, extra_body=held).output_text)
