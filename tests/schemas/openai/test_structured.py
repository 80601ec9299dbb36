"""The forms in which requests say what an answer must match."""

from __future__ import annotations

import json
from typing import Any

import pytest

from loray.errors import RequestError
from loray.schemas.openai import ChatCompletionRequest, CompletionRequest, parse
from loray.spec import Constraint

SCHEMA = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}, "required": ["a"]}
TAGS = {
    "type": "structural_tag",
    "structures": [{"begin": "<f=x>", "schema": SCHEMA, "end": "</f>"}],
    "triggers": ["<f="],
}


def constraint(**fields: Any) -> Constraint | None:
    chat = parse(ChatCompletionRequest, {"model": "m", "messages": [{"role": "user", "content": "x"}], **fields})
    completion = parse(CompletionRequest, {"model": "m", "prompt": "x", **fields})
    params = [r.sampling(max_tokens=9, choice=0).structured for r in (chat, completion)]
    assert params[0] == params[1]
    return params[0]


def response_format(**fields: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", **fields}}}


A_JSON_OBJECT = {"response_format": {"type": "json_object"}}
JSON = Constraint.from_schema(SCHEMA)
OBJECT, LENIENT = Constraint.from_schema({"type": "object"}), Constraint.from_schema(SCHEMA, lenient=True)


def spaced(whitespace: str) -> Constraint:
    return JSON.model_copy(update={"whitespace": whitespace})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": None, "guided_json": None}, None),
        (A_JSON_OBJECT, OBJECT),
        (response_format(schema=SCHEMA), LENIENT),
        (response_format(schema=SCHEMA, strict=True, description="d"), JSON),
        (response_format(schema=SCHEMA, strict=False), LENIENT),
        (response_format(schema=SCHEMA, strict=None), LENIENT),
        ({"structured_outputs": {"json": SCHEMA}}, JSON),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, JSON),
        ({"structured_outputs": {"json": SCHEMA, "whitespace_pattern": " ?"}}, spaced(" ?")),
        ({"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}}, spaced("")),
        ({"structured_outputs": {"json_object": True}}, OBJECT),
        ({"structured_outputs": {"json_object": False}}, None),
        ({"structured_outputs": {"regex": "a+", "disable_fallback": True}}, Constraint.from_regex("a+")),
        ({"structured_outputs": {"choice": ["a", "b"]}}, Constraint.from_choice(["a", "b"])),
        ({"structured_outputs": {"grammar": "start: A"}}, Constraint.from_grammar("start: A")),
        ({"guided_json": SCHEMA, "guided_decoding_backend": "xgrammar"}, JSON),
        ({"guided_json": SCHEMA, "guided_whitespace_pattern": " "}, spaced(" ")),
        ({"guided_regex": "a+"}, Constraint.from_regex("a+")),
        ({"guided_choice": ["a", "b"]}, Constraint.from_choice(["a", "b"])),
        ({"guided_grammar": "start: A"}, Constraint.from_grammar("start: A")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_forms(fields: dict[str, Any], expected: Constraint | None) -> None:
    assert constraint(**fields) == expected


def test_an_objects_order_is_kept() -> None:
    made = constraint(guided_json=SCHEMA)
    assert made is not None
    assert list(json.loads(made.text)["properties"]) == ["b", "a"]


def test_structural_tags() -> None:
    made = constraint(response_format=TAGS)
    assert made is not None
    assert made == constraint(structured_outputs={"structural_tag": json.dumps(TAGS)})
    assert made == constraint(structural_tag=json.dumps(TAGS))
    assert made.kind == "grammar"
    assert 'head_0[lazy]: TEXT "<f="' in made.text


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guided_json": SCHEMA, "guided_regex": "a"}, "choose from guided_json, guided_regex"),
        ({"structured_outputs": {"regex": "a"}} | A_JSON_OBJECT, "from structured_outputs.regex, response_format"),
        ({"structured_outputs": {"json": {}, "choice": ["a"]}}, "structured_outputs.json, structured_outputs.choice"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "json_schema belongs to"),
        ({"response_format": {"type": "text", "json_schema": {"name": "n", "schema": {}}}}, "json_schema belongs to"),
        (response_format(), "json_schema.schema"),
        (response_format(schema=[1]), "must be a JSON schema"),
        (response_format(schema=SCHEMA, stricter=True), "stricter"),
        ({"guided_json": "{"}, "is not JSON"),
        ({"guided_json": "[" * 60_000}, "is not JSON"),
        ({"guided_json": "[" * 100_000}, "at most 65,536 characters"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice"),
        ({"structured_outputs": {"disable_additional_properties": True}}, "additionalProperties: false"),
        ({"structured_outputs": {"structural_tag": "{}"}}, "must be JSON of"),
        ({"structured_outputs": {"structural_tag": '{"type": "text"}'}}, "must be of"),
        ({"response_format": TAGS | {"triggers": ["<g="]}}, "no trigger is the beginning"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"bad_words": ["x" * 257]}, "256 characters"),
        ({"bad_words": [""]}, "non-empty string"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as raised:
        constraint(**fields)
    assert message in str(raised.value)
    assert raised.value.param
    assert raised.value.param.split(".")[0] in fields


def test_deep_schemas_are_refused() -> None:
    def nested(depth: int) -> dict[str, Any]:
        schema: dict[str, Any] = {"type": "string"}
        for _ in range(depth):
            schema = {"items": schema}
        return schema

    assert constraint(guided_json=nested(50)) is not None
    for depth in (70, 100_000):
        with pytest.raises(RequestError, match="nested deeper than 64"):
            constraint(guided_json=nested(depth))


@pytest.mark.parametrize(
    "fields",
    [
        {"guided_json": {"enum": list(range(1_000_000))}},
        {"guided_json": {"properties": {str(i): {"type": "string"} for i in range(1_001)}}},
        {"guided_json": {"anyOf": [{"properties": {str(i): {"type": "string"} for i in range(900)}}] * 12}},
        {"guided_choice": ["x"] * 1_000_000},
    ],
    ids=["enum", "members", "properties", "choice"],
)
def test_large_ones_are_refused_before_they_are_copied(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json, "dumps", None)
    with pytest.raises(RequestError, match=r"more than 20000 values|more than 1,000 members|at most 10000 items"):
        constraint(**fields)


def test_allowed_tokens_and_bad_words() -> None:
    body = {"model": "m", "prompt": "x", "allowed_token_ids": [1, 2], "bad_words": ["no", "never"]}
    request = parse(CompletionRequest, body)
    params = request.sampling(max_tokens=1, choice=0, bad_words=((3,), (4, 5)))
    assert request.bad_words == ("no", "never")
    assert (params.allowed_token_ids, params.bad_words) == ((1, 2), ((3,), (4, 5)))
