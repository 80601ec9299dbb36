"""The gateway's errors: bad requests, failures before and after the first token, unknown URLs."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.engine.pool.pool import cut_pool
from loray.errors import EngineError, GrammarTooExpensive, IntegrityError, Overloaded, RequestError, StoreError
from loray.spec import ServeSpec
from serve_apps.gateway import errors
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.gateway import CHAT, HELLO, ScriptedEngines, delta, error_of, events_of, gateway_app, register


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[1, 2",
        b'{"n": NaN}',
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xed\xa0\x80"}',
    ],
)
def test_malformed_json(client_of: Any, raw: bytes) -> None:
    with client_of(ScriptedEngines(HELLO)) as client:
        for path in ("/v1/completions", "/v1/chat/completions"):
            error = error_of(client.post(path, content=raw, headers={"content-type": "application/json"}), 400)
            assert "not valid JSON" in error["message"]
            assert error["type"] == "invalid_request_error"


def test_too_large_bodies(client_of: Any, base: BaseModel, catalog: Catalog) -> None:
    register(catalog, "long", base.fingerprint, context_length=1 << 15)
    with client_of(ScriptedEngines(HELLO)) as client:  # 64 bytes for a token of the longest context
        assert error_of(client.complete(prompt="x" * (1 << 20)), 400)["code"] == "context_length_exceeded"
        error = error_of(client.complete(prompt=[1] * 5_000_000), 413)
        assert error["code"] == "request_too_large"
        assert "2 MiB" in error["message"]
    with client_of(ScriptedEngines(HELLO), max_body_bytes=1000) as client:
        assert "larger max_body_bytes" in error_of(client.chat(messages=CHAT * 100), 413)["message"]


def test_invalid_fields(client_of: Any) -> None:
    with client_of(ScriptedEngines(HELLO)) as client:
        for param, value in {
            "temperature": 3,
            "tools": [{}],
            "temperatur": 1,
            "prompt": "",
            "repetition_penalty": 1e-40,  # 0 in fp32
            "stop_token_ids": list(range(129)),
        }.items():
            error = error_of(client.complete(**{param: value}), 400)
            assert error["param"] == param
            assert param in error["message"]
        listed = client.post("/v1/completions", content=b"[]", headers={"Content-Type": "application/json"})
        assert error_of(listed, 400)["message"].endswith("a JSON object")


def test_prompt_too_long_says_the_limits(client_of: Any, base: BaseModel, catalog: Catalog) -> None:
    register(catalog, "long", base.fingerprint, context_length=1024)
    engines = ScriptedEngines(HELLO)
    with client_of(engines) as client:
        for body, numbers in (
            ({"prompt": "x" * 600}, ("512", "600")),
            ({"prompt": "x" * 500, "max_tokens": 13}, ("512", "500", "13", "12")),
            ({"model": "long", "prompt": "x" * 1024}, ("1024",)),
        ):
            error = error_of(client.complete(**body), 400)
            assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
            assert all(number in error["message"] for number in numbers)
        assert error_of(client.chat(messages=[{"role": "user", "content": "x" * 600}]), 400)["param"] == "messages"
        assert not engines.requests
        # A LongLoRA adapter has its own context; a default is lowered to the rest of the context.
        assert client.complete(model="long", prompt="x" * 600).status_code == 200
        assert client.complete(prompt="x" * 505).status_code == 200
        assert engines.requests[-1].params.max_tokens == 7


def test_the_pool_limits_the_context_too(client_of: Any, base: BaseModel) -> None:
    layout, _ = cut_pool(ServeSpec(), base.config)
    pool_bytes = 4 * 2 * layout.num_layers * layout.layer_share  # four blocks of bfloat16
    with client_of(ScriptedEngines(HELLO), pool_bytes=pool_bytes) as client:
        assert client.get(f"/v1/models/{base.name}").json()["max_model_len"] == 64  # and before any request
        error = error_of(client.complete(prompt="x" * 65), 400)
    assert "64 tokens" in error["message"]
    with client_of(ScriptedEngines(HELLO), device="cuda") as client:  # only its replicas know what a GPU leaves
        assert client.get(f"/v1/models/{base.name}").json()["max_model_len"] == base.config.max_position_embeddings


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("failure", "status", "code", "retry_after"),
    [
        (Overloaded("full", retry_after_s=2.3), 429, "overloaded", "3"),
        (EngineError("lost"), 503, "engine_unavailable", "1"),
        (StoreError("no answer"), 503, "store_unavailable", "5"),
        (StoreError("no answer", retry_after_s=31.5), 503, "store_unavailable", "32"),
        (IntegrityError("damaged file"), 500, "adapter_damaged", None),
        (RequestError("no", "prompt"), 400, None, None),
        (GrammarTooExpensive("slow"), 400, "grammar_too_expensive", None),
        (ZeroDivisionError("secret"), 500, "internal_error", None),
    ],
)
def test_failures_before_the_first_token_have_their_status(
    monkeypatch: pytest.MonkeyPatch,
    client_of: Any,
    failure: Exception,
    status: int,
    code: str | None,
    retry_after: str | None,
    stream: bool,
) -> None:
    monkeypatch.setattr(errors, "uniform", min)
    with client_of(ScriptedEngines([failure])) as client:
        response = client.complete(stream=stream)
    error = error_of(response, status)
    assert error["code"] == code
    assert response.headers.get("retry-after") == retry_after
    assert "secret" not in response.text


def test_a_failure_in_the_middle_of_a_stream_is_its_last_event(client_of: Any) -> None:
    with client_of(ScriptedEngines([delta("a"), EngineError("the replica was lost")])) as client:
        *_, last = events_of(client.chat(stream=True))
        assert last["error"]["message"] == "the replica was lost"
        assert last["error"].keys() == {"message", "type", "param", "code"}
        error_of(client.chat(), 503)


def test_who_finds_an_engine_full_comes_back_at_a_time_of_its_own() -> None:
    failures = [errors.failure_of(Overloaded("full", retry_after_s=2.0)) for _ in range(100)]
    times = [float(failure.headers["Retry-After-Ms"]) for failure in failures]
    assert 2000 < min(times) < 2250 < 2750 < max(times) <= 3000


def test_unknown_urls_and_methods(client_of: Any) -> None:
    with client_of(ScriptedEngines()) as client:
        error = error_of(client.get("/v1/nothing"), 404)
        assert error == {
            "message": "Invalid URL (GET /v1/nothing)",
            "type": "invalid_request_error",
            "param": None,
            "code": "unknown_url",
        }
        response = client.get("/v1/completions")
        assert error_of(response, 405)["code"] == "method_not_allowed"
        assert response.headers["allow"] == "POST"


async def test_a_client_that_leaves_while_it_sends_is_no_error(
    base: BaseModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])
    receive, send = AsyncMock(side_effect=messages), AsyncMock()
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
    await gateway_app(base, sqlite_catalog(tmp_path), ScriptedEngines())(scope, receive, send)
    assert send.call_args_list[0].args[0]["status"] == 499
    assert not caplog.records
