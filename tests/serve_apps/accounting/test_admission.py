"""Requests in turn, and the middleware that holds them up or refuses them before their body is read."""

from __future__ import annotations

import asyncio
import math
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.types import Message, Receive, Scope, Send

from loray.errors import Overloaded
from loray.policy.fair_admission import FairAdmission
from loray.spec import Limits, Principal
from serve_apps.accounting import accounts
from serve_apps.accounting.accounts import AdmitRequests, TenantTurns, Turn, UsageMeter
from serve_apps.gateway.answers.headers import RequestHeaders


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

    def refused(error: Exception) -> Response:
        return PlainTextResponse(str(error), 429)

    middleware = AdmitRequests(app, UsageMeter(), TenantTurns(), ["/v1/completions"], refused)

    async def ask(path: str, **limits: Any) -> tuple[int, Scope]:
        principal = Principal(tenant="acme", key_id="k", limits=Limits(**limits))
        scope: Scope = {"type": "http", "method": "POST", "path": path, "headers": []}
        scope["state"] = {"principal": principal}
        sent: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"{}"}

        async def send(message: Message) -> None:
            sent.append(message)

        await middleware(scope, receive, send)
        return sent[0]["status"], scope

    status, scope = await ask("/v1/completions", rpm_limit=0)
    assert (status, read, scope["route"].path) == (429, [], "/v1/completions")
    assert (await ask("/v1/models", rpm_limit=0))[0] == 200
    status, scope = await ask("/v1/completions")
    assert (status, len(read)) == (200, 2)
    assert Request(scope).state.received_at <= asyncio.get_running_loop().time()
    assert not RequestHeaders.of(Request(scope)).is_modest, "nobody else has asked"
    middleware._turns._fair.ask("other", Turn("other", asyncio.Future()), asyncio.get_running_loop().time())
    status, scope = await ask("/v1/completions")
    assert RequestHeaders.of(Request(scope)).is_modest
