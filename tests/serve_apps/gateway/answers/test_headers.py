"""Headers of requests: the client's id, its tenant, the time that it waits."""

from __future__ import annotations

from typing import Any

import pytest

from loray.bases.registry import BaseModel
from serve_apps.gateway.answers.headers import IGNORED, ignored_fields
from tests.fixtures.gateway import CHAT, HELLO, ScriptedEngines, delta, error_of

UNIQUE = {"type": "array", "items": {"type": "integer"}, "uniqueItems": True, "not": {"const": []}}


@pytest.mark.parametrize("stream", [False, True])
def test_a_sane_request_id_is_taken_over(client_of: Any, stream: bool) -> None:
    engines = ScriptedEngines(HELLO)
    with client_of(engines) as client:
        for given in ("trace-7", "trace-7", "x" * 128):
            response = client.complete({"X-Request-Id": given}, n=2, stream=stream)
            assert response.headers["x-request-id"] == given
            assert all(r.request_id.startswith(given) for r in engines.requests[-2:])
        for bad in ("x" * 129, "with space", b"\xc3\xa9", ""):
            response = client.complete({"X-Request-Id": bad}, n=2, stream=stream)
            assert response.headers["x-request-id"].startswith("cmpl-")
    assert len({r.request_id for r in engines.requests}) == len(engines.requests)


def test_errors_and_other_routes_have_the_id_too(client_of: Any) -> None:
    with client_of(ScriptedEngines()) as client:
        for method, path in (("GET", "/health"), ("GET", "/nothing"), ("POST", "/v1/completions")):
            response = client.request(method, path, headers={"X-Request-Id": "trace-7"})
            assert response.headers.get_list("x-request-id") == ["trace-7"]
        assert "x-request-id" not in client.get("/health").headers


def test_the_shorter_of_the_two_times_counts(client_of: Any) -> None:
    for spec, header in ((None, "0.05"), (0.05, "30"), (30, "0.05"), (0.05, None)):
        engines = ScriptedEngines(hang=True)
        with client_of(engines, request_timeout_s=spec) as client:
            headers = {} if header is None else {"X-Request-Timeout-S": header}
            error = error_of(client.complete(headers), 504)
        assert error["code"] == "deadline_exceeded"
        assert "0.05 s" in error["message"]
        assert len(engines.closed) == len(engines.requests) <= 1  # the time may end before the engine is asked


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", ""])
def test_a_time_that_is_none_is_refused(client_of: Any, value: str) -> None:
    with client_of(ScriptedEngines(HELLO)) as client:
        error = error_of(client.complete({"X-Request-Timeout-S": value}), 400)
    assert error["param"] == "X-Request-Timeout-S"


@pytest.mark.parametrize("strict", [None, False, True])
@pytest.mark.parametrize("path", ["chat/completions", "responses", "completions"])
def test_a_schema_is_enforced_as_a_whole_only_where_it_is_strict(
    client_of: Any, base: BaseModel, strict: bool | None, path: str
) -> None:
    engines = ScriptedEngines([delta("[1]", "stop")])
    named = {"name": "n", "schema": UNIQUE} | ({} if strict is None else {"strict": strict})
    response_format = {"type": "json_schema", "json_schema": named}
    forms: dict[str, Any] = {
        "chat/completions": {"messages": CHAT, "response_format": response_format},
        "responses": {"input": "x", "text": {"format": {"type": "json_schema"} | named}},
        "completions": {"prompt": "x", "response_format": response_format},
    }
    with client_of(engines) as client:
        answer = client.post(f"/v1/{path}", json={"model": base.name} | forms[path])
        if strict:
            assert answer.status_code == 400
            assert "uniqueItems" in answer.json()["error"]["message"]
            return
        assert answer.status_code == 200, answer.text
        assert set(answer.headers[IGNORED].split(", ")) == {"not", "uniqueItems"}
        whole = client.complete(guided_json={"type": "array"})
        assert (whole.status_code, IGNORED in whole.headers) == (200, False)


def test_words_of_a_schema_that_are_no_header_are_left_out() -> None:
    assert ignored_fields(["$x", "a\r\nSet-Cookie: b", "ü", "not"]) == {IGNORED: "$x, not"}
    assert ignored_fields(["ü"]) == ignored_fields(["x" * 65]) == {}
    assert ignored_fields([f"x{i}" for i in range(100)])[IGNORED].split(", ") == [f"x{i}" for i in range(10)]
