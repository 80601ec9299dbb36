"""Limits over HTTP, what is settled at each end of a request, and requests in turn while a gateway is late."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse
from starlette.types import Message, Receive, Scope, Send

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.errors import Overloaded
from loray.policy.fair_admission import FairAdmission
from loray.spec import Limits, Principal, TokenDelta
from serve_apps.accounting import accounts
from serve_apps.accounting.access_log import AccessLog
from serve_apps.accounting.accounts import AdmitRequests, TenantTurns, Turn, UsageMeter
from tests.fixtures.accounts import Front
from tests.fixtures.gateway import ScriptedEngines, delta, register


@pytest.fixture
def front(tiny_base: Callable[..., BaseModel], tmp_path: Path) -> Front:
    return Front(tiny_base(), tmp_path)


@pytest.mark.parametrize("path", ["/completions", "/chat/completions", "/responses", "/embeddings"])
async def test_headers_and_a_refusal_in_openais_form(front: Front, path: str) -> None:
    given = {"model": front.base.name} | {
        "/completions": {"prompt": "abc", "max_tokens": 4},
        "/chat/completions": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
        "/responses": {"input": "hi", "max_output_tokens": 4},
        "/embeddings": {"input": ["hi", "ho"]},
    }[path]
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
    assert [event.outcome for event in front.events] == ["ok"]


async def test_without_limits_there_are_no_headers(front: Front) -> None:
    async with front.asking(ScriptedEngines([delta("ok", "stop")])) as client:
        response = await client.post("/completions", json=front.body())
        assert not [name for name in response.headers if name.startswith("x-ratelimit")]


async def test_embeddings_count_as_one_request_with_all_their_tokens(front: Front) -> None:
    limits = {"rpm_limit": 2, "max_parallel_requests": 1, "tpm_limit": 1000}
    async with front.asking(ScriptedEngines([TokenDelta((), "stop", embedding=(1.0,))]), **limits) as client:
        for left in (1, 0):
            answer = await client.post("/embeddings", json={"model": front.base.name, "input": ["abcd"] * 5})
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-ratelimit-remaining-requests"] == str(left)
            assert int(answer.headers["x-ratelimit-remaining-tokens"]) in range(960, 981)
    assert [(e.num_prompt_tokens, e.num_output_tokens, e.outcome) for e in front.events] == [(20, 0, "ok")] * 2


@pytest.mark.parametrize("stream", [False, True])
async def test_what_was_reserved_is_settled(front: Front, stream: bool) -> None:
    script = [delta("a"), delta("b", "stop")]  # three tokens, of 200 reserved
    async with front.asking(ScriptedEngines(script), tpm_limit=1000, max_parallel_requests=1) as client:
        for i in range(4):
            response = await client.post("/completions", json=front.body(max_tokens=200, stream=stream))
            assert response.status_code == 200, response.text
            remaining = int(response.headers["x-ratelimit-remaining-tokens"])
            assert remaining in range(1000 - 206 - 9 * i, 1000 - 206 - 9 * i + 20)
    assert [(e.num_prompt_tokens, e.num_output_tokens) for e in front.events] == [(6, 3)] * 4


async def test_choices_of_one_prompt_count_it_once(front: Front) -> None:
    async with front.asking(ScriptedEngines([delta("a", "stop")])) as client:
        await client.post("/completions", json=front.body(prompt=["abc", "de"], n=2))
    (event,) = front.events
    assert (event.num_prompt_tokens, event.num_output_tokens) == (5, 8)


@pytest.mark.parametrize(
    ("engines", "outcome", "tokens"),
    [
        (ScriptedEngines([Overloaded("full", 1.0)]), "overloaded", (0, 0)),
        (ScriptedEngines([delta("ab"), ValueError("broken")]), "internal_error", (6, 2)),
    ],
)
async def test_a_request_that_fails(
    front: Front, engines: ScriptedEngines, outcome: str, tokens: tuple[int, int]
) -> None:
    async with front.asking(engines, max_parallel_requests=1) as client:
        for _ in range(2):  # the first one's place is free again
            response = await client.post("/completions", json=front.body())
            assert "max_parallel" not in response.text
            assert response.json()["error"]["code"] == outcome
    ended = [(e.outcome, (e.num_prompt_tokens, e.num_output_tokens)) for e in front.events]
    assert ended == [(outcome, tokens)] * 2


async def test_a_client_that_leaves_pays_for_what_it_got(front: Front) -> None:
    engines = ScriptedEngines([delta("abc")], hang=True)
    async with front.asking(engines, tpm_limit=450, max_parallel_requests=1) as client:
        request = asyncio.create_task(client.post("/completions", json=front.body(max_tokens=400, stream=True)))
        while not engines.requests:
            await asyncio.sleep(0.001)
        request.cancel()
        with suppress(asyncio.CancelledError):
            await request
        engines.script, engines.hang = [delta("a", "stop")], False
        response = await client.post("/completions", json=front.body(max_tokens=400))
        assert response.status_code == 200, response.text
    first, second = front.events
    assert first.outcome in ("disconnected", "cancelled")
    assert second.outcome == "ok"


async def test_the_event_names_the_adapter_and_reaches_the_catalog(front: Front) -> None:
    catalog = Catalog(front.url)
    version = register(catalog, "tone", front.base.fingerprint)
    engines = ScriptedEngines([delta("a", "stop")])
    async with front.asking(engines, min_priority=-3) as client:
        for priority in (-5, 7):
            await client.post("/completions", json=front.body(model="tone@1", priority=priority))
    assert [request.priority for request in engines.requests] == [-3, 7]
    first, second = front.events
    assert (first.tenant, first.key_id, first.model, first.digest) == ("acme", "k1", "tone", version.digest)
    assert (first.tier, second.tier) == ("priority", "flex")
    (row,) = catalog.usage.sums(["tenant", "key", "model"])
    assert (row.tenant, row.key_id, row.model, row.num_requests) == ("acme", "k1", "tone", 2)
    catalog.close()


async def test_a_budget_counts_what_was_used_before_the_start(front: Front) -> None:
    for _ in range(2):
        async with front.asking(ScriptedEngines([delta("abcd", "length")]), max_budget=25) as client:
            response = await client.post("/completions", json=front.body())
            assert response.status_code == 200
            while (response := await client.post("/completions", json=front.body())).status_code == 200:
                pass
            assert "25 tokens in 30d of the key k1" in response.json()["error"]["message"]
    assert len(front.events) in (3, 4)  # two of ten tokens; then one or two before the catalog has answered


async def test_the_access_log_has_refusals_and_no_prompts(front: Front, tmp_path: Path) -> None:
    target = tmp_path / "access.jsonl"
    log = AccessLog(str(target))
    async with front.asking(ScriptedEngines([delta("secret", "stop")]), log=log, rpm_limit=1) as client:
        for _ in range(2):
            headers = {"X-Request-Id": "mine", "Authorization": "Bearer sk-lr-hidden"}
            await client.post("/completions?x=hidden", json=front.body(prompt="secret"), headers=headers)
    log.close()
    text = target.read_text()
    assert not any(word in text for word in ("secret", "hidden"))
    first, second = (json.loads(line) for line in text.splitlines())
    assert (first["status"], first["tenant"], first["key_id"], first["request_id"]) == (200, "acme", "k1", "mine")
    assert (first["num_prompt_tokens"], first["num_output_tokens"], first["outcome"]) == (6, 7, "ok")
    assert (second["status"], second["path"], "model" in second) == (429, "/v1/completions", False)


def crowded() -> FairAdmission[Turn]:
    """One request more than the limit of one is under way, of `flood`, and `steady` has asked."""
    fair = FairAdmission[Turn](target=-1.0, least=1)  # which is always late
    turns = [Turn(tenant, asyncio.Future()) for tenant in ("flood", "flood", "steady")]
    now = asyncio.get_running_loop().time()
    assert all(fair.ask(turn.tenant, turn, now) for turn in turns)
    fair.ended("steady", now)
    fair.observe(1.0, now)
    fair.limit = 1.0
    return fair


async def test_a_turn_that_came_and_one_that_was_cancelled() -> None:
    fair = crowded()
    turns = TenantTurns(fair)
    waiting = [asyncio.create_task(turns.enter("flood")) for _ in range(3)]
    await asyncio.sleep(0)
    assert turns.num_waiting == 3
    waiting[0].cancel()
    await turns.enter("steady")  # has none under way
    turns.leave("steady")
    turns.leave("flood")
    await asyncio.sleep(0)
    assert not waiting[1].done(), "the limit is one"
    turns.leave("flood")
    await asyncio.wait(waiting[:2])
    assert waiting[0].cancelled()
    assert waiting[1].result() is None
    waiting[2].cancel()
    await asyncio.wait(waiting)
    turns.leave("flood")
    assert fair._num == turns.num_waiting == 0


async def test_a_flood_waits_while_tokens_are_late() -> None:
    fair = FairAdmission[Turn](least=1)
    turns = TenantTurns(fair)
    turns.tokens_are_late(9.0)
    assert fair.limit == math.inf, "nobody is here"
    for tenant in ("steady", "flood", "flood", "flood"):
        await turns.enter(tenant)
    fair._changed_at = asyncio.get_running_loop().time()
    for _ in range(2):
        fair._changed_at -= 0.3
        turns.tokens_are_late(1.2)  # of what they may be
    assert fair.limit == 2
    fair._changed_at -= 0.3
    turns.tokens_are_late(0.8)
    assert fair.limit == 2.25, "it grows again, by one a second"
    waiting = asyncio.create_task(turns.enter("flood"))
    await asyncio.sleep(0)
    assert turns.num_waiting == 1
    waiting.cancel()
    await asyncio.wait([waiting])


async def test_a_turn_that_came_to_a_request_that_was_cancelled_goes_on() -> None:
    turns = TenantTurns(crowded())
    waiting = [asyncio.create_task(turns.enter("flood")) for _ in range(2)]
    await asyncio.sleep(0)
    waiting[0].cancel()
    for _ in range(2):
        turns.leave("flood")  # before the cancelled task runs
    await asyncio.wait(waiting)
    assert waiting[0].cancelled()
    assert waiting[1].result() is None


async def test_who_waits_for_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounts, "LONGEST_S", 0.0)
    fair = crowded()
    with pytest.raises(Overloaded, match="flood has more requests there than others"):
        await TenantTurns(fair).enter("flood")
    assert not fair._num_waiting


async def test_the_middleware_refuses_before_the_body_is_read_and_leaves_other_paths_alone() -> None:
    read: list[Message] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        read.append(await receive())
        await PlainTextResponse("done")(scope, receive, send)

    middleware = AdmitRequests(
        app, UsageMeter(), TenantTurns(), ["/v1/completions"], lambda e: PlainTextResponse(str(e), 429)
    )

    async def ask(path: str, **limits: Any) -> tuple[int, Scope]:
        principal = Principal(tenant="acme", key_id="k", limits=Limits(**limits))
        scope: Scope = {"type": "http", "method": "POST", "path": path, "headers": []}
        scope["state"] = {"principal": principal}
        send = AsyncMock()
        await middleware(scope, AsyncMock(return_value={"type": "http.request", "body": b"{}"}), send)
        return send.call_args_list[0].args[0]["status"], scope

    status, scope = await ask("/v1/completions", rpm_limit=0)
    assert (status, read, scope["route"].path) == (429, [], "/v1/completions")
    assert (await ask("/v1/models", rpm_limit=0))[0] == 200
    status, scope = await ask("/v1/completions")
    assert (status, len(read)) == (200, 2)
    assert Request(scope).state.received_at <= asyncio.get_running_loop().time()
