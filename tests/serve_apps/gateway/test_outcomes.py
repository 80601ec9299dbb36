"""What is counted of requests at their end, and what headers say of schemas that are not enforced as a whole."""

from __future__ import annotations

import re
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.errors import EngineError
from serve_apps.gateway.answers.headers import IGNORED, ignored_fields
from tests.serve_apps.gateway.scripted import ScriptedEngines, delta

UNIQUE = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "not": {"const": []}}


def outcomes(text: str, route: str) -> dict[str, float]:
    lines = re.findall(r"loray_requests_total{(.*)} (.+)", text)
    named = [(dict(re.findall(r'(\w+)="([^"]*)"', labels)), float(n)) for labels, n in lines]
    return {labels["outcome"]: n for labels, n in named if labels["route"] == route}


def test_answers_that_break_off_are_counted_as_broken(client_of: Any, base: BaseModel) -> None:
    engines = ScriptedEngines([delta("a"), EngineError("the engine was killed")])
    body = {"model": base.name, "prompt": "a", "stream": True}
    with client_of(engines) as client:
        for _ in range(10):
            answer = client.post("/v1/completions", json=body)
            assert answer.status_code == 200
            assert "engine_unavailable" in answer.text
        engines.script = [EngineError("the engine was killed")]
        client.post("/v1/completions", json=body)
        engines.script = [delta("a", "stop")]
        client.post("/v1/completions", json=body)
        client.post("/v1/completions", json=body | {"n": 0})
        counted = outcomes(client.get("/metrics").text, "/v1/completions")
    assert counted == {"broken": 10, "failed": 1, "ok": 1, "client_error": 1}


@pytest.mark.parametrize("strict", [None, False, True])
@pytest.mark.parametrize("path", ["chat/completions", "responses", "completions"])
def test_a_schema_is_enforced_as_a_whole_only_where_it_is_strict(
    client_of: Any, base: BaseModel, strict: bool | None, path: str
) -> None:
    engines = ScriptedEngines([delta("[1]", "stop")])
    named = {"name": "n", "schema": UNIQUE} | ({} if strict is None else {"strict": strict})
    forms: dict[str, Any] = {
        "chat/completions": {
            "messages": [{"role": "user", "content": "x"}],
            "response_format": {"type": "json_schema", "json_schema": named},
        },
        "responses": {"input": "x", "text": {"format": {"type": "json_schema"} | named}},
        "completions": {"prompt": "x", "response_format": {"type": "json_schema", "json_schema": named}},
    }
    with client_of(engines) as client:
        answer = client.post(f"/v1/{path}", json={"model": base.name} | forms[path])
        if strict:
            assert answer.status_code == 400
            assert "uniqueItems" in answer.json()["error"]["message"]
            return
        assert answer.status_code == 200, answer.text
        assert set(answer.headers[IGNORED].split(", ")) == {"not", "uniqueItems"}
        whole = client.post(
            "/v1/completions", json={"model": base.name, "prompt": "x", "guided_json": {"type": "array"}}
        )
        assert (whole.status_code, IGNORED in whole.headers) == (200, False)


def test_words_of_a_schema_that_are_no_header_are_left_out() -> None:
    assert ignored_fields(["$x", "a\r\nSet-Cookie: b", "ü", "not"]) == {IGNORED: "$x, not"}
    assert ignored_fields(["ü"]) == {}
    assert len(ignored_fields(["x" * 500] * 100)[IGNORED]) == 1024
