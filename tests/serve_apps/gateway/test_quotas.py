"""Limits over HTTP: headers, refusals in OpenAI's form, and what is settled at each end of a request."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.errors import Overloaded
from loray.settings import Settings
from loray.spec import Limits, Principal, ServeSpec, UsageEvent
from serve_apps.accounting.access_log import AccessLog, LogAccess
from serve_apps.accounting.accounts import UsageMeter, UsageSink
from serve_apps.gateway.app import create_app
from serve_apps.gateway.bases import ServedBase
from serve_apps.gateway.directory import ModelResolver
from serve_apps.gateway.gateway import Gateway
from tests.fixtures.catalogs import sqlite_catalog
from tests.serve_apps.gateway.scripted import ScriptedEngines, delta, register
from tests.serve_apps.keys import Given, following

PROMPT = {"model": "tiny", "prompt": "abcdef", "max_tokens": 4}


class Kept(UsageSink):
    """Books that keep the events for the test, and send them too."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self.events: list[UsageEvent] = []

    def add(self, event: UsageEvent) -> None:
        self.events.append(event)
        super().add(event)


class Front:
    def __init__(self, base: BaseModel, folder: Path) -> None:
        self.url = sqlite_catalog(folder)
        self.books = Kept(Settings.from_env({"LORAY_HOME": str(folder), "LORAY_CATALOG": self.url}))
        self.base = base

    @asynccontextmanager
    async def asking(
        self, engines: ScriptedEngines, log: AccessLog | None = None, **limits: Any
    ) -> AsyncIterator[httpx.AsyncClient]:
        principal = Principal(tenant="acme", key_id="k1", limits=Limits(**limits))
        directory = ModelResolver([self.base], following(self.url))
        served = ServedBase.open(ServeSpec(base=self.base.name), self.base, engines)
        app = create_app(Gateway([served], directory, accounts=UsageMeter(sink=self.books)), Given(principal))
        if log is not None:
            app.add_middleware(LogAccess, log=log)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with (
            app.router.lifespan_context(app),
            httpx.AsyncClient(transport=transport, base_url="http://test/v1") as client,
        ):
            yield client


@pytest.fixture
def front(base: BaseModel, tmp_path: Path) -> Front:
    return Front(base, tmp_path)


def body(front: Front, **fields: Any) -> dict[str, Any]:
    return PROMPT | {"model": front.base.name} | fields


@pytest.mark.parametrize("path", ["/completions", "/chat/completions", "/responses"])
def test_headers_and_a_refusal_in_openais_form(front: Front, path: str) -> None:
    given = {"model": front.base.name} | {
        "/completions": {"prompt": "abc", "max_tokens": 4},
        "/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
        "/responses": {"input": "hi", "max_output_tokens": 4},
    }[path]

    async def run() -> None:
        async with front.asking(ScriptedEngines([delta("ok", "stop")]), rpm_limit=1, tpm_limit=100_000) as client:
            first = await client.post(path, json=given)
            assert first.status_code == 200
            assert first.headers["x-ratelimit-limit-requests"] == "1"
            assert first.headers["x-ratelimit-remaining-requests"] == "0"
            assert first.headers["x-ratelimit-limit-tokens"] == "100000"
            refused = await client.post(path, json=given)
            assert refused.status_code == 429
            error = refused.json()["error"]
            assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
            assert "1 requests a minute of the key k1" in error["message"]
            assert int(refused.headers["retry-after"]) in range(58, 61)
            assert refused.headers["x-ratelimit-remaining-requests"] == "0"

    asyncio.run(run())
    assert [event.outcome for event in front.books.events] == ["ok"]


def test_without_limits_there_are_no_headers(front: Front) -> None:
    async def run() -> None:
        async with front.asking(ScriptedEngines([delta("ok", "stop")])) as client:
            response = await client.post("/completions", json=body(front))
            assert not [name for name in response.headers if name.startswith("x-ratelimit")]

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
def test_what_was_reserved_is_settled(front: Front, stream: bool) -> None:
    async def run() -> None:
        script = [delta("a"), delta("b", "stop")]  # three tokens, of 200 reserved
        async with front.asking(ScriptedEngines(script), tpm_limit=1000, max_parallel_requests=1) as client:
            for i in range(4):
                response = await client.post("/completions", json=body(front, max_tokens=200, stream=stream))
                assert response.status_code == 200, response.text
                remaining = int(response.headers["x-ratelimit-remaining-tokens"])
                assert remaining in range(1000 - 206 - 9 * i, 1000 - 206 - 9 * i + 20)

    asyncio.run(run())
    assert [(e.num_prompt_tokens, e.num_output_tokens) for e in front.books.events] == [(6, 3)] * 4


def test_choices_of_one_prompt_count_it_once(front: Front) -> None:
    async def run() -> None:
        async with front.asking(ScriptedEngines([delta("a", "stop")])) as client:
            await client.post("/completions", json=body(front, prompt=["abc", "de"], n=2))

    asyncio.run(run())
    (event,) = front.books.events
    assert (event.num_prompt_tokens, event.num_output_tokens) == (5, 8)


@pytest.mark.parametrize(
    ("engines", "outcome", "tokens"),
    [
        (ScriptedEngines([Overloaded("full", 1.0)]), "overloaded", (0, 0)),
        (ScriptedEngines([delta("ab"), ValueError("broken")]), "internal_error", (6, 2)),
    ],
)
def test_a_request_that_fails(front: Front, engines: ScriptedEngines, outcome: str, tokens: tuple[int, int]) -> None:
    async def run() -> None:
        async with front.asking(engines, max_parallel_requests=1) as client:
            for _ in range(2):  # the first one's place is free again
                response = await client.post("/completions", json=body(front))
                assert "max_parallel" not in response.text
                assert response.json()["error"]["code"] == outcome

    asyncio.run(run())
    ended = [(e.outcome, (e.num_prompt_tokens, e.num_output_tokens)) for e in front.books.events]
    assert ended == [(outcome, tokens)] * 2


def test_a_client_that_leaves_pays_for_what_it_got(front: Front) -> None:
    async def run() -> None:
        engines = ScriptedEngines([delta("abc")], hang=True)
        async with front.asking(engines, tpm_limit=450, max_parallel_requests=1) as client:
            request = asyncio.create_task(client.post("/completions", json=body(front, max_tokens=400, stream=True)))
            while not engines.requests:
                await asyncio.sleep(0.001)
            request.cancel()
            with suppress(asyncio.CancelledError):
                await request
            engines.script, engines.hang = [delta("a", "stop")], False
            response = await client.post("/completions", json=body(front, max_tokens=400))
            assert response.status_code == 200, response.text

    asyncio.run(run())
    first, second = front.books.events
    assert first.outcome in ("disconnected", "cancelled")
    assert second.outcome == "ok"


def test_the_event_names_the_adapter_and_reaches_the_catalog(front: Front, base: BaseModel) -> None:
    catalog = Catalog(front.url)
    version = register(catalog, "tone", base.fingerprint)

    async def run() -> None:
        engines = ScriptedEngines([delta("a", "stop")])
        async with front.asking(engines, min_priority=-3) as client:
            for priority in (-5, 7):
                await client.post("/completions", json=body(front, model="tone@1", priority=priority))
        assert [request.priority for request in engines.requests] == [-3, 7]

    asyncio.run(run())
    first, second = front.books.events
    assert (first.tenant, first.key_id, first.model, first.digest) == ("acme", "k1", "tone", version.digest)
    assert (first.tier, second.tier) == ("priority", "flex")
    (row,) = catalog.usage(["tenant", "key", "model"])
    assert (row.tenant, row.key_id, row.model, row.num_requests) == ("acme", "k1", "tone", 2)
    catalog.close()


def test_a_budget_counts_what_was_used_before_the_start(front: Front) -> None:
    async def run() -> None:
        for _ in range(2):
            async with front.asking(ScriptedEngines([delta("abcd", "length")]), max_budget=25) as client:
                response = await client.post("/completions", json=body(front))
                assert response.status_code == 200
                while (response := await client.post("/completions", json=body(front))).status_code == 200:
                    pass
                assert "25 tokens in 30d of the key k1" in response.json()["error"]["message"]

    asyncio.run(run())
    assert len(front.books.events) in (3, 4)  # two of ten tokens; then one or two before the catalog has answered


def test_the_access_log_has_refusals_and_no_prompts(front: Front, tmp_path: Path) -> None:
    target = tmp_path / "access.jsonl"
    log = AccessLog(str(target))

    async def run() -> None:
        async with front.asking(ScriptedEngines([delta("secret", "stop")]), log=log, rpm_limit=1) as client:
            for _ in range(2):
                headers = {"X-Request-Id": "mine", "Authorization": "Bearer sk-lr-hidden"}
                await client.post("/completions?x=hidden", json=body(front, prompt="secret"), headers=headers)

    asyncio.run(run())
    log.close()
    text = target.read_text()
    assert not any(word in text for word in ("secret", "hidden"))
    first, second = (json.loads(line) for line in text.splitlines())
    assert (first["status"], first["tenant"], first["key_id"], first["request_id"]) == (200, "acme", "k1", "mine")
    assert (first["num_prompt_tokens"], first["num_output_tokens"], first["outcome"]) == (6, 7, "ok")
    assert (second["status"], second["path"], "model" in second) == (429, "/v1/completions", False)
