"""Lines of batches in a gateway: as their key would ask, behind all people, without a deadline."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.errors import Overloaded
from loray.schemas.access import KeyChange
from loray.spec import BATCH_PRIORITY, Limits
from serve_apps.batches import LineAnswer
from serve_apps.gateway.files.lines import BatchLines
from serve_apps.http import WithoutRequestId
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.gateway import HELLO, REPLICA, ScriptedEngines, gateway_app, register
from tests.fixtures.keys import access_of

COMPLETIONS = "/v1/completions"
Opened = Callable[..., AbstractAsyncContextManager[BatchLines]]


@pytest.fixture
def opened(base: BaseModel, tmp_path: Path) -> Opened:
    @asynccontextmanager
    async def open_lines(engines: ScriptedEngines, **spec: Any) -> AsyncIterator[BatchLines]:
        url = sqlite_catalog(tmp_path)
        app = gateway_app(base, url, engines, access=access_of(url), **spec)
        async with app.router.lifespan_context(app):
            lines = app.state.lines
            assert isinstance(lines, BatchLines)
            yield lines

    return open_lines


def body(base: BaseModel, **fields: Any) -> bytes:
    return json.dumps({"model": base.name, "prompt": "a", "max_tokens": 5} | fields).encode()


def error(answer: LineAnswer) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(answer.body)["error"]
    return found


async def test_a_line_is_a_request_behind_all_others(base: BaseModel, opened: Opened) -> None:
    engines = ScriptedEngines(HELLO)
    async with opened(engines, request_timeout_s=0.001) as lines:
        answer = await lines.run_line(None, "acme", COMPLETIONS, body(base, priority=-5))
        assert (answer.status, answer.refusal) == (200, None)
        assert json.loads(answer.body)["choices"][0]["text"] == "hello"
        assert answer.request_id == json.loads(answer.body)["id"]
        chat = json.dumps({"model": base.name, "messages": [{"role": "user", "content": "hi"}]}).encode()
        answer = await lines.run_line(None, "acme", "/v1/chat/completions", chat)
        assert json.loads(answer.body)["object"] == "chat.completion"
    assert [(request.priority, request.tenant) for request in engines.requests] == [(BATCH_PRIORITY, "acme")] * 2


async def test_a_line_has_its_id_where_ray_serve_gives_requests_theirs(base: BaseModel, tmp_path: Path) -> None:
    url = sqlite_catalog(tmp_path)
    app = gateway_app(base, url, ScriptedEngines(HELLO), access=access_of(url))
    app.add_middleware(WithoutRequestId)
    async with app.router.lifespan_context(app):
        answer = await app.state.lines.run_line(None, "acme", COMPLETIONS, body(base))
    assert answer.request_id == json.loads(answer.body)["id"]


async def test_wrong_lines_have_their_answers(base: BaseModel, opened: Opened) -> None:
    async with opened(ScriptedEngines(HELLO)) as lines:
        answer = await lines.run_line(None, "default", COMPLETIONS, body(base, temperature=-1))
        assert (answer.status, answer.refusal, error(answer)["param"]) == (400, None, "temperature")
        answer = await lines.run_line(None, "default", COMPLETIONS, body(base, model="nobody"))
        assert (answer.status, answer.refusal, error(answer)["code"]) == (404, None, "model_not_found")
        answer = await lines.run_line(None, "default", COMPLETIONS, b"{")
        assert (answer.status, answer.refusal) == (400, None)


async def test_overload_is_told_apart(base: BaseModel, opened: Opened) -> None:
    async with opened(ScriptedEngines([Overloaded("full", 3.0)])) as lines:
        answer = await lines.run_line(None, "default", COMPLETIONS, body(base))
        assert (answer.status, answer.refusal) == (429, "overloaded")
        assert 3.0 <= answer.retry_after_s <= 4.5


async def test_keys(base: BaseModel, opened: Opened, tmp_path: Path) -> None:
    with closing(Catalog(sqlite_catalog(tmp_path))) as catalog:
        catalog.tenants.create("acme")

        def key(alias: str, *scopes: Any, **limits: Any) -> str:
            made = catalog.keys.create(alias, tenant="acme", scopes=frozenset(scopes or {"infer"}), **limits)
            return made.key.id

        good, trains, gone = key("good"), key("trains", "train"), key("gone")
        spent = key("spent", limits=Limits(max_budget=12.0))
        small, slow = key("small", limits=Limits(tpm_limit=2)), key("slow", limits=Limits(rpm_limit=1))
        narrow = key("narrow", models=["other"])
        catalog.keys.revoke(gone)
        rotated = catalog.keys.rotate(good).key.id
        async with opened(ScriptedEngines(HELLO)) as lines:

            async def ask(key_id: str | None) -> LineAnswer:
                return await lines.run_line(key_id, "acme", COMPLETIONS, body(base))

            for key_id in (good, rotated):
                assert (await ask(key_id)).status == 200
            assert (await ask(gone)).refusal == "revoked"
            assert (await ask("key-x")).refusal == "revoked"
            for key_id in (trains, narrow):
                answer = await ask(key_id)
                assert (answer.status, answer.refusal) == (403, None)
            answer = await ask(small)  # it will never be admitted
            assert (answer.status, answer.refusal) == (429, None)
            assert [(await ask(slow)).refusal for _ in range(2)] == [None, "limit"]
            # A prompt of one token and two of the answer, of which a budget counts half; three are reserved of six.
            assert [(await ask(spent)).refusal for _ in range(8)][-1] == "budget"
            catalog.keys.update(rotated, KeyChange(blocked=True))
            await lines._access.refresh()
            lines._access._accounts.clear()
            assert (await ask(good)).refusal == "blocked"


async def test_bases_and_loads(base: BaseModel, opened: Opened, tmp_path: Path) -> None:
    engines = ScriptedEngines()
    engines.replicas = [REPLICA.model_copy(update={"longest_wait_s": wait}) for wait in (0.1, 0.7)]
    with closing(Catalog(sqlite_catalog(tmp_path))) as catalog:
        register(catalog, "tone", base.fingerprint)
        async with opened(engines) as lines:
            found = await lines.bases_of(None, "default", ["tone", "tone@1", base.name, "nobody"])
            assert found == {"tone": base.name, "tone@1": base.name, base.name: base.name, "nobody": None}
            load = (await lines.loads())[base.name]
            assert (load.wait_s, load.is_cold) == (0.7, False)
