"""Fields that nobody knows: ignored and named, refused where they are likely typing errors or nothing is ignored."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loray.errors import RequestError, UnknownParameter
from loray.schemas.openai import ChatCompletionRequest, CompletionRequest, parse
from loray.schemas.openai.fields import OTHER, UnknownFields, reading
from loray.schemas.openai.responses_api import ResponsesRequest, chat_request

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


def ignored(schema: Any = ChatCompletionRequest, **fields: Any) -> list[str]:
    with reading(UnknownFields()) as unknown:
        parse(schema, (CHAT if schema is ChatCompletionRequest else {"model": "m"}) | fields)
    return list(unknown.ignored)


def refused(*, everything: bool = False, **fields: Any) -> RequestError:
    with reading(UnknownFields(refuse=everything)), pytest.raises(RequestError) as e:
        parse(ChatCompletionRequest, CHAT | fields)
    return e.value


def test_they_are_ignored_and_named_in_every_object() -> None:
    assert ignored(CompletionRequest, prompt="a", colour="red", mood={"a": 1}) == ["colour", "mood"]
    message = {"role": "user", "content": "hi", "id": "msg_1", "parts": []}
    tool = TOOL | {"function": TOOL["function"] | {"cost": 3}, "version": 2}  # type: ignore[operator]
    stream = {"include_usage": True, "compression": "gzip"}
    found = ignored(messages=[message, message], tools=[tool], stream=True, stream_options=stream, id="r")
    assert sorted(found) == ["compression", "cost", "id", "parts", "version"]
    choice = {"type": "function", "function": {"name": "add"}, "cache": True}
    assert ignored(tools=[TOOL], tool_choice=choice) == ["cache"]
    tags = {"type": "structural_tag", "structures": [{"begin": "<a>", "end": "</a>", "note": 1}], "triggers": ["<a>"]}
    assert ignored(structural_tag=json.dumps(tags)) == ["note"]


def test_nulls_are_neither_refused_nor_named() -> None:
    message = {"role": "user", "content": "hi", "contents": None, "mood": None}
    assert ignored(messages=[message], temperatur=None, colour=None) == []


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("temperatur", "temperature"),
        ("tempreature", "temperature"),  # two that changed places
        ("max_token", "max_tokens"),
        ("maxtokenss", "max_tokens"),
        ("stpo", "stop"),
        ("sead", "seed"),
        ("logits_processor", "logits_processors"),  # known, and not supported
        ("xx_tokens", "max_tokens"),
    ],
)
def test_likely_typing_errors_are_refused(name: str, meant: str) -> None:
    error = refused(**{name: 1})
    assert (error.status, error.code, error.param) == (400, "unknown_parameter", name)
    assert f"did you mean {meant!r}?" in str(error)


@pytest.mark.parametrize("name", ["tempera", "seeeeed", "stxx", "mx_tokns_"])
def test_what_is_three_edits_away_is_another_field_and_two_of_a_short_name(name: str) -> None:
    assert ignored(**{name: 1}) == [name]


def test_typing_errors_are_those_of_the_same_object() -> None:
    error = refused(messages=[{"role": "user", "content": "a"}, {"role": "user", "contnet": "b"}])
    assert (error.param, error.code) == ("messages.1.contnet", "unknown_parameter")
    assert ignored(messages=[{"role": "user", "content": "hi", "temperatur": 1}]) == ["temperatur"]


def test_all_are_refused_where_nothing_is_ignored() -> None:
    error = refused(everything=True, colour=1, messages=[{"role": "user", "content": "hi", "mood": 1}])
    assert (error.param, error.code) == ("messages.0.mood", "unknown_parameter")
    assert "unknown field 'colour'; known fields: " in str(error)
    with pytest.raises(UnknownParameter, match="colour"):  # also outside of a block
        parse(ChatCompletionRequest, CHAT | {"colour": 1})


def test_of_the_responses_api_and_the_chat_behind_it() -> None:
    def asked(**fields: Any) -> list[str]:
        with reading(UnknownFields()) as unknown:
            request = chat_request(parse(ResponsesRequest, {"model": "m", "input": "hi"} | fields))
        assert request.seed == fields.get("seed")
        return list(unknown.ignored)

    assert asked(seed=3, colour=1, text={"format": {"type": "text"}, "mood": 1}) == ["colour", "mood"]
    for field in ("max_output_token", "seeed", "previous_response_ids", "mesages"):
        with pytest.raises(UnknownParameter, match="did you mean") as e:
            asked(**{field: 1})
        assert e.value.param == field


def test_names_that_no_header_can_have() -> None:
    assert ignored(**{"a\r\nb": 1, "größe": 1, "x" * 65: 1, "": 1, "x-y.z": 1}) == [OTHER, "x-y.z"]


def test_there_may_not_be_too_many() -> None:
    assert len(ignored(**{f"colour{i}": 1 for i in range(64)})) == 64
    error = refused(**{f"colour{i}": 1 for i in range(2000)})
    assert (error.code, "more than 64 unknown" in str(error)) == ("unknown_parameter", True)
    many = [{"role": "user", "content": "hi", "colour": 1}] * 1000
    assert ignored(messages=many) == ["colour"]
