"""Headers of requests: the client's id, its tenant, the time that it waits."""

from __future__ import annotations

from typing import Any

import pytest

from loray.bases.registry import BaseModel
from tests.serve_apps.gateway.scripted import ScriptedEngines
from tests.serve_apps.gateway.test_gateway import HELLO, error_of


@pytest.mark.parametrize("stream", [False, True])
def test_a_sane_request_id_is_taken_over(client_of: Any, base: BaseModel, stream: bool) -> None:
    engines = ScriptedEngines(HELLO)
    body = {"model": base.name, "prompt": "a", "n": 2, "stream": stream}
    with client_of(engines) as client:
        for given in ("trace-7", "trace-7", "x" * 128):
            response = client.post("/v1/completions", json=body, headers={"X-Request-Id": given})
            assert response.headers["x-request-id"] == given
            assert all(r.request_id.startswith(given) for r in engines.requests[-2:])
        for bad in ("x" * 129, "with space", b"\xc3\xa9", ""):
            response = client.post("/v1/completions", json=body, headers={"X-Request-Id": bad})
            assert response.headers["x-request-id"].startswith("cmpl-")
    assert len({r.request_id for r in engines.requests}) == len(engines.requests)


def test_errors_and_other_routes_have_the_id_too(client_of: Any) -> None:
    with client_of(ScriptedEngines()) as client:
        for method, path in (("GET", "/health"), ("GET", "/nothing"), ("POST", "/v1/completions")):
            response = client.request(method, path, headers={"X-Request-Id": "trace-7"})
            assert response.headers.get_list("x-request-id") == ["trace-7"]
        assert "x-request-id" not in client.get("/health").headers


def test_the_shorter_of_the_two_times_counts(client_of: Any, base: BaseModel) -> None:
    body = {"model": base.name, "prompt": "a"}
    for spec, header, seconds in (
        (None, "0.05", "0.05"),
        (0.05, "30", "0.05"),
        (30, "0.05", "0.05"),
        (0.05, None, "0.05"),
    ):
        engines = ScriptedEngines(hang=True)
        with client_of(engines, request_timeout_s=spec) as client:
            headers = {} if header is None else {"X-Request-Timeout-S": header}
            error = error_of(client.post("/v1/completions", json=body, headers=headers), 504)
        assert error["code"] == "deadline_exceeded"
        assert f"{seconds} s" in error["message"]
        assert len(engines.closed) == len(engines.requests) <= 1  # the time may end before the engine is asked


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", ""])
def test_a_time_that_is_none_is_refused(client_of: Any, base: BaseModel, value: str) -> None:
    with client_of(ScriptedEngines(HELLO)) as client:
        headers = {"X-Request-Timeout-S": value}
        error = error_of(client.post("/v1/completions", json={"model": base.name, "prompt": "a"}, headers=headers), 400)
    assert error["param"] == "X-Request-Timeout-S"
