"""What clients of other versions and servers send: unknown fields and paths, stored responses, SageMaker's path."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest
import uvicorn

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.errors import SettingsError
from loray.settings import Settings
from loray.spec import Limits, ServeSpec
from serve_apps.gateway import metrics
from serve_apps.gateway.answers.headers import IGNORED, STRICT
from serve_apps.gateway.app import create_app
from serve_apps.gateway.bases import ServedBase
from serve_apps.gateway.directory import ModelResolver
from serve_apps.gateway.gateway import Gateway
from tests.fixtures.access import bearer
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.gateway import (
    CHAT,
    HELLO,
    GatewayClient,
    ScriptedEngines,
    error_of,
    events_of,
    gateway_app,
    openai_of,
)
from tests.fixtures.keys import access_of

NOT_STORED = "nothing is stored here: send the conversation in `input`"


async def raw(app: Any, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """Send the bytes of an HTTP request to the application behind uvicorn's parser and writer."""
    config = uvicorn.Config(app, log_config=None, lifespan="off", server_header=False, date_header=False)
    server = uvicorn.Server(config)
    config.load()
    listener = await asyncio.get_running_loop().create_server(
        lambda: config.http_protocol_class(config, server.server_state, {}),  # type: ignore[call-arg, operator, union-attr]
        "127.0.0.1",
    )
    async with listener:
        reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
        writer.write(request)
        answer = await reader.read()
        writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = (line.split(": ", 1) for line in lines)
    return int(first.split()[1]), {name.lower(): value for name, value in headers}, body


# -- unknown fields ---------------------------------------------------------------------------------------------------


def test_unknown_fields_are_named_in_a_header(client_of: Any) -> None:
    with client_of(ScriptedEngines(HELLO)) as client:
        message = CHAT[0] | {"id": "msg_1"}
        for body in ({"stream": False}, {"stream": True}):
            answer = client.chat(messages=[message], colour="red", **body)
            assert (answer.status_code, answer.headers[IGNORED]) == (200, "colour, id")
        assert IGNORED not in client.chat().headers
        told = client.post("/tokenize", json={"prompt": "a", "colour": 1})
        assert (told.status_code, told.headers[IGNORED]) == (200, "colour")
        many = client.complete(**{f"colour{i}": 1 for i in range(20)})
        assert many.headers[IGNORED] == ", ".join(f"colour{i}" for i in range(10))
        schema = {"type": "array", "uniqueItems": True}
        answer_format = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
        both = client.complete(prompt="x", response_format=answer_format, colour=1)
        assert both.headers[IGNORED] == "uniqueItems, colour"


@pytest.mark.parametrize(("name", "param"), [("temperatur", "temperatur"), ("maxtokens", "maxtokens")])
def test_likely_typing_errors_are_400(client_of: Any, name: str, param: str) -> None:
    with client_of(ScriptedEngines(HELLO)) as client:
        error = error_of(client.chat(**{name: 1}), 400)
        assert (error["code"], error["param"]) == ("unknown_parameter", param)


def test_a_strict_request_has_all_refused(client_of: Any) -> None:
    with client_of(ScriptedEngines(HELLO)) as client:
        for value, status in (("true", 400), ("True", 400), ("false", 200)):
            assert client.chat(colour=1, headers={STRICT: value}).status_code == status
        assert error_of(client.chat(colour=1, headers={STRICT: "true"}), 400)["code"] == "unknown_parameter"
        assert client.chat(headers={STRICT: "true"}).status_code == 200
        assert error_of(client.chat(headers={STRICT: "yes"}), 400)["param"] == STRICT


def test_a_deployment_has_all_refused(base: BaseModel, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="LORAY_UNKNOWN_FIELDS='no' must be ignore or refuse"):
        Settings.from_env({"LORAY_UNKNOWN_FIELDS": "no"})
    assert "LORAY_UNKNOWN_FIELDS" not in Settings.from_env({}).to_serving_env()
    settings = Settings.from_env({"LORAY_UNKNOWN_FIELDS": "refuse"})
    assert Settings.from_env(settings.to_serving_env()).refuses_unknown_fields
    access = access_of(sqlite_catalog(tmp_path))
    served = [ServedBase.open(ServeSpec(base=base.name), base, ScriptedEngines(HELLO))]
    gateway = Gateway(served, ModelResolver([base], access.follower), refuses_unknown_fields=True)
    with GatewayClient(create_app(gateway, access)) as client:
        client.base = base.name
        assert error_of(client.chat(colour=1), 400)["code"] == "unknown_parameter"
        assert client.chat(colour=1, headers={STRICT: "false"}).status_code == 400
        assert client.chat().status_code == 200


def test_they_are_counted_by_name(client_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_MOST_NAMES", 2)
    with client_of(ScriptedEngines(HELLO)) as client:
        for name in ("colour", "mood", "colour", "flavour", "größe"):
            assert client.complete(**{name: 1}).status_code == 200
        counted = [line for line in client.get("/metrics").text.splitlines() if "ignored_fields_total{" in line]
    found = {line.partition('field="')[2].partition('"')[0]: float(line.split()[-1]) for line in counted}
    assert found == {"colour": 2, "mood": 1, "other": 2}


async def test_openais_client_sends_newer_fields(base: BaseModel, tmp_path: Path) -> None:
    async with openai_of(gateway_app(base, sqlite_catalog(tmp_path), ScriptedEngines(HELLO))) as client:
        create = client.chat.completions.with_raw_response.create
        newer = {"extra_body": {"thought_style": "short"}}
        answer = await create(model=base.name, messages=CHAT, **newer)
        assert answer.headers[IGNORED] == "thought_style"
        assert answer.parse().choices[0].message.content == "hello"
        with pytest.raises(openai.BadRequestError) as e:
            await create(model=base.name, messages=CHAT, extra_body={"temprature": 1})
        assert (e.value.code, e.value.param) == ("unknown_parameter", "temprature")
        with pytest.raises(openai.BadRequestError):
            await create(model=base.name, messages=CHAT, extra_headers={STRICT: "true"}, **newer)


# -- paths ------------------------------------------------------------------------------------------------------------


async def test_unknown_paths_and_methods_as_bytes_before_keys(base: BaseModel, tmp_path: Path) -> None:
    access = access_of(sqlite_catalog(tmp_path), host="0.0.0.0")
    app = gateway_app(base, sqlite_catalog(tmp_path), ScriptedEngines(), access=access)
    end = b"Host: a\r\nConnection: close\r\n\r\n"
    status, _, body = await raw(app, b"GET /v1/x HTTP/1.1\r\n" + end)
    error = {"message": "Invalid URL (GET /v1/x)", "type": "invalid_request_error", "param": None}
    assert (status, json.loads(body)) == (404, {"error": error | {"code": "unknown_url"}})
    status, headers, body = await raw(app, b"GET /v1/chat/completions HTTP/1.1\r\n" + end)
    assert (status, headers["allow"], json.loads(body)["error"]["code"]) == (405, "POST", "method_not_allowed")
    status, headers, body = await raw(app, b"OPTIONS /v1/chat/completions HTTP/1.1\r\n" + end)
    assert (status, headers["allow"], body) == (204, "POST", b"")
    status, headers, body = await raw(app, b"GET /v1/models HTTP/1.1\r\n" + end)
    assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")
    access.close()


async def test_openais_client_learns_of_paths_that_are_not_here(base: BaseModel, tmp_path: Path) -> None:
    async with openai_of(gateway_app(base, sqlite_catalog(tmp_path), ScriptedEngines())) as client:
        with pytest.raises(openai.NotFoundError) as e:
            await client.images.generate(prompt="a cat")
        assert (e.value.code, e.value.status_code) == ("unknown_url", 404)


def test_a_route_that_does_not_say_who_may_call_it_stops_the_start(
    base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_apps.gateway.routes.may", lambda action: lambda endpoint: endpoint)
    with pytest.raises(TypeError, match="does not say who may call it"):
        gateway_app(base, sqlite_catalog(tmp_path), ScriptedEngines())


# -- budgets ----------------------------------------------------------------------------------------------------------


async def test_a_budget_that_is_used_up_is_asked_for_once(base: BaseModel, tmp_path: Path) -> None:
    url = sqlite_catalog(tmp_path)
    keys = Catalog(url).keys
    poor = keys.create("poor", scopes=("infer",), limits=Limits(max_budget=1, budget_duration="30d")).secret
    busy = keys.create("busy", scopes=("infer",), limits=Limits(rpm_limit=1)).secret
    app = gateway_app(base, url, ScriptedEngines(HELLO))
    num_asked = 0
    async with openai_of(app) as client:

        async def count(_: Any) -> None:
            nonlocal num_asked
            num_asked += 1

        client._client.event_hooks["request"].append(count)
        create = client.with_options(api_key=poor, max_retries=3).chat.completions.create
        with pytest.raises(openai.RateLimitError) as e:
            await create(model=base.name, messages=CHAT)
        assert (e.value.response.headers["x-should-retry"], num_asked) == ("false", 1)
        ask = client.with_options(api_key=busy).chat.completions.create
        await ask(model=base.name, messages=CHAT)
        with pytest.raises(openai.RateLimitError) as e:
            await ask(model=base.name, messages=CHAT)
        assert "x-should-retry" not in e.value.response.headers


# -- responses without state ------------------------------------------------------------------------------------------


async def test_stored_responses_as_openais_client_asks_for_them(base: BaseModel, tmp_path: Path) -> None:
    async with openai_of(gateway_app(base, sqlite_catalog(tmp_path), ScriptedEngines(HELLO))) as client:
        responses = client.responses
        answer = await responses.create(
            model=base.name, input="hi", store=True, include=["reasoning.encrypted_content"]
        )
        assert (answer.store, answer.output_text) == (False, "hello")
        assert "encrypted_content" not in answer.model_dump_json()
        for call in (
            responses.retrieve(answer.id),
            responses.delete(answer.id),
            responses.cancel(answer.id),
            responses.input_items.list(answer.id),
        ):
            with pytest.raises(openai.NotFoundError, match="nothing is stored here") as e:
                await call
            assert e.value.code == "response_not_found"
        for name, value in {
            "previous_response_id": answer.id,
            "conversation": "conv_1",
            "background": True,
            "prompt": {"id": "pmpt_1"},
        }.items():
            with pytest.raises(openai.BadRequestError, match=NOT_STORED) as refused:
                await responses.create(model=base.name, input="hi", **{name: value})
            assert (refused.value.code, refused.value.param) == ("unsupported_parameter", name)
        assert (await responses.create(model=base.name, input="hi", background=False)).background is False


# -- SageMaker --------------------------------------------------------------------------------------------------------


def test_one_path_for_all_forms(client_of: Any) -> None:
    with client_of(ScriptedEngines(HELLO)) as client:

        def ask(**body: Any) -> Any:
            return client.post("/invocations", json={"model": client.base} | body)

        assert client.get("/ping").status_code == 200
        chat, completion, response = ask(messages=CHAT), ask(prompt="a"), ask(input="a")
        assert (chat.json()["object"], chat.json()["choices"][0]["message"]["content"]) == ("chat.completion", "hello")
        assert (completion.json()["object"], response.json()["object"]) == ("text_completion", "response")
        *_, last = events_of(ask(messages=CHAT, stream=True))
        assert last == "[DONE]"
        assert ask(messages=CHAT, colour=1).headers[IGNORED] == "colour"
        for wrong in ({}, {"messages": CHAT, "prompt": "a"}, {"prompt": None}):
            assert "give one of messages" in error_of(ask(**wrong), 400)["message"]
        assert error_of(client.post("/invocations", json=[]), 400)


def test_it_has_the_limits_of_the_other_paths(base: BaseModel, tmp_path: Path) -> None:
    url = sqlite_catalog(tmp_path)
    secret = Catalog(url).keys.create("sage", scopes=("infer",), limits=Limits(rpm_limit=1)).secret
    with GatewayClient(gateway_app(base, url, ScriptedEngines(HELLO))) as client:
        body = {"model": base.name, "messages": CHAT}
        assert client.post("/invocations", json=body).status_code == 401
        first = client.post("/invocations", json=body, headers=bearer(secret))
        assert (first.status_code, first.headers["x-ratelimit-remaining-requests"]) == (200, "0")
        assert client.post("/invocations", json=body, headers=bearer(secret)).status_code == 429
