"""The gateway's errors: bad requests, failures before and after the first token, unknown URLs."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.engine.pool.pool import cut_pool
from loray.errors import EngineError, GrammarTooExpensive, IntegrityError, Overloaded, RequestError, StoreError
from loray.spec import ServeSpec
from serve_apps.gateway import errors
from tests.fixtures.catalogs import sqlite_catalog
from tests.serve_apps.gateway.scripted import ScriptedEngines, delta, gateway_app, register
from tests.serve_apps.gateway.test_gateway import (
    _HALF_A_PAIR,
    CHAT,
    HELLO,
    error_of,
    events_of,
)


@pytest.mark.parametrize("raw", [b"", b"{", b"[1, 2", b'{"n": NaN}', b"\xff\xfe", b"[" * 100_000, *_HALF_A_PAIR])
def test_malformed_json(client_of: Any, raw: bytes) -> None:
    with client_of(ScriptedEngines(HELLO)) as client:
        for path in ("/v1/completions", "/v1/chat/completions"):
            error = error_of(client.post(path, content=raw, headers={"content-type": "application/json"}), 400)
            assert "not valid JSON" in error["message"]
            assert error["type"] == "invalid_request_error"


def test_too_large_bodies(client_of: Any, base: BaseModel, catalog: Catalog) -> None:
    register(catalog, "long", base.fingerprint, context_length=1 << 15)
    text = {"model": base.name, "prompt": "x" * (1 << 20)}
    with client_of(ScriptedEngines(HELLO)) as client:  # 64 bytes for a token of the longest context
        assert error_of(client.post("/v1/completions", json=text), 400)["code"] == "context_length_exceeded"
        ids = {"model": base.name, "prompt": [1] * 5_000_000}
        error = error_of(client.post("/v1/completions", json=ids), 413)
        assert error["code"] == "request_too_large"
        assert "2 MiB" in error["message"]
    with client_of(ScriptedEngines(HELLO), max_body_bytes=1000) as client:
        error = error_of(client.post("/v1/chat/completions", json={"model": base.name, "messages": CHAT * 100}), 413)
        assert "larger max_body_bytes" in error["message"]


def test_invalid_fields(client_of: Any, base: BaseModel) -> None:
    with client_of(ScriptedEngines(HELLO)) as client:
        for fields, param in (
            ({"temperature": 3}, "temperature"),
            ({"tools": [{}]}, "tools"),
            ({"colour": 1}, "colour"),
            ({"prompt": ""}, "prompt"),
            ({"repetition_penalty": 1e-40}, "repetition_penalty"),  # 0 in fp32
            ({"stop_token_ids": list(range(129))}, "stop_token_ids"),
        ):
            error = error_of(client.post("/v1/completions", json={"model": base.name, "prompt": "a"} | fields), 400)
            assert error["param"] == param
            assert param in error["message"]
        assert error_of(
            client.post("/v1/completions", content=b"[]", headers={"Content-Type": "application/json"}), 400
        )["message"].endswith("a JSON object")


def test_prompt_too_long_says_the_limits(client_of: Any, base: BaseModel, catalog: Catalog) -> None:
    register(catalog, "long", base.fingerprint, context_length=1024)
    engines = ScriptedEngines(HELLO)
    with client_of(engines) as client:
        for body, numbers in (
            ({"model": base.name, "prompt": "x" * 600}, ("512", "600")),
            ({"model": base.name, "prompt": "x" * 500, "max_tokens": 13}, ("512", "500", "13", "12")),
            ({"model": "long", "prompt": "x" * 1024}, ("1024",)),
        ):
            error = error_of(client.post("/v1/completions", json=body), 400)
            assert error["code"] == "context_length_exceeded"
            assert error["param"] == "prompt"
            assert all(number in error["message"] for number in numbers)
        chat = {"model": base.name, "messages": [{"role": "user", "content": "x" * 600}]}
        assert error_of(client.post("/v1/chat/completions", json=chat), 400)["param"] == "messages"
        assert not engines.requests
        # A LongLoRA adapter has its own context; a default is lowered to the rest of the context.
        assert client.post("/v1/completions", json={"model": "long", "prompt": "x" * 600}).status_code == 200
        assert client.post("/v1/completions", json={"model": base.name, "prompt": "x" * 505}).status_code == 200
        assert engines.requests[-1].params.max_tokens == 7


def test_the_pool_limits_the_context_too(client_of: Any, base: BaseModel) -> None:
    layout, _ = cut_pool(ServeSpec(), base.config)
    pool_bytes = 4 * 2 * layout.num_layers * layout.layer_share  # four blocks of bfloat16
    with client_of(ScriptedEngines(HELLO), pool_bytes=pool_bytes) as client:
        assert client.get(f"/v1/models/{base.name}").json()["max_model_len"] == 64  # and before any request
        error = error_of(client.post("/v1/completions", json={"model": base.name, "prompt": "x" * 65}), 400)
    assert "64 tokens" in error["message"]
    with client_of(ScriptedEngines(HELLO), device="cuda") as client:  # only its replicas know what a GPU leaves
        assert client.get(f"/v1/models/{base.name}").json()["max_model_len"] == base.config.max_position_embeddings


def test_only_a_default_may_be_lowered_by_the_replica(client_of: Any, base: BaseModel) -> None:
    engines = ScriptedEngines(HELLO)
    body = {"model": base.name, "messages": CHAT}
    with client_of(engines) as client:
        client.post("/v1/chat/completions", json=body)
        client.post("/v1/chat/completions", json=body | {"max_completion_tokens": 5})
    assert engines.fits == [True, False]


def test_the_model_is_resolved_before_the_prompt_is_encoded(client_of: Any) -> None:
    with client_of(ScriptedEngines(HELLO)) as client:
        body = {"model": "nobody", "prompt": ""}
        assert error_of(client.post("/v1/completions", json=body), 404)["code"] == "model_not_found"


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
    base: BaseModel,
    failure: Exception,
    status: int,
    code: str | None,
    retry_after: str | None,
    stream: bool,
) -> None:
    monkeypatch.setattr(errors, "uniform", min)
    with client_of(ScriptedEngines([failure])) as client:
        response = client.post("/v1/completions", json={"model": base.name, "prompt": "a", "stream": stream})
    error = error_of(response, status)
    assert error["code"] == code
    assert response.headers.get("retry-after") == retry_after
    assert "secret" not in response.text


def test_a_failure_in_the_middle_of_a_stream_is_its_last_event(client_of: Any, base: BaseModel) -> None:
    engines = ScriptedEngines([delta("a"), EngineError("the replica was lost")])
    with client_of(engines) as client:
        body = {"model": base.name, "messages": CHAT, "stream": True}
        *_, last = events_of(client.post("/v1/chat/completions", json=body))
        assert last["error"]["message"] == "the replica was lost"
        assert last["error"].keys() == {"message", "type", "param", "code"}
        error_of(client.post("/v1/chat/completions", json=body | {"stream": False}), 503)


def test_who_finds_an_engine_full_comes_back_at_a_time_of_its_own() -> None:
    failures = [errors.failure_of(Overloaded("full", retry_after_s=2.0)) for _ in range(100)]
    times = [float(failure.headers["Retry-After-Ms"]) for failure in failures]
    assert 2000 < min(times) < 2250 < 2750 < max(times) <= 3000


def test_one_failed_choice_ends_the_others(client_of: Any, base: BaseModel) -> None:
    engines = ScriptedEngines([delta("a"), Overloaded("full", 1)], hang=True)
    with client_of(engines) as client:
        error_of(client.post("/v1/completions", json={"model": base.name, "prompt": ["a", "b"], "n": 2}), 429)
    assert sorted(engines.closed) == sorted(r.request_id for r in engines.requests)


def test_unknown_urls_and_methods(client_of: Any) -> None:
    with client_of(ScriptedEngines()) as client:
        assert error_of(client.get("/v1/nothing"), 404)["code"] == "unknown_url"
        response = client.get("/v1/completions")
        assert error_of(response, 405)["code"] == "method_not_allowed"
        assert response.headers["allow"] == "POST"


def test_a_client_that_leaves_while_it_sends_is_no_error(
    base: BaseModel, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])
    sent: list[Any] = []

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b""}
    scope["headers"] = [(b"content-type", b"application/json")]
    app = gateway_app(base, sqlite_catalog(tmp_path), ScriptedEngines())
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 499
    assert not caplog.records
