"""What a request's headers say: its id, how long it may take, and with the keys' middleware whose it is."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loray.errors import RequestError
from loray.spec import Principal
from serve_apps.access import principal_of
from serve_apps.tracing import RequestTrace

REQUEST_ID = "X-Request-Id"
TIMEOUT = "X-Request-Timeout-S"
SESSION_ID = "X-Session-ID"
PRIORITY = "X-Loray-Priority"  # of the response: the priority that was applied, where one was asked or it is not 0
IGNORED = "X-Loray-Ignored-Fields"  # of the response: keywords of a schema that answers may violate
ADAPTER = "X-Adapter-Version"  # of the response: which version has answered, as `name@version`
_MAX_ID = 128
_MAX_IGNORED = 1024  # characters


class RequestHeaders(NamedTuple):
    """`received_at` is a time of the event loop; `principal` is who asks, as the keys' middleware found it; `trace` the
    request's span, where traces are exported; `session_id` what the client calls the session; `is_modest` as in
    GenerateRequest, when the request began.
    """

    received_at: float
    principal: Principal = Principal()
    request_id: str | None = None
    timeout_s: float | None = None
    trace: RequestTrace | None = None
    session_id: str | None = None
    is_modest: bool = False

    @classmethod
    def of(cls, request: Request) -> RequestHeaders:
        """Raises RequestError if the time is not a positive number. An id that is too long or not visible ASCII counts
        as absent."""
        state, headers = request.scope.get("state", {}), request.headers
        received_at, trace = state.get("received_at", asyncio.get_running_loop().time()), state.get("trace")
        timeout_s, session_id = _timeout(headers.get(TIMEOUT)), headers.get(SESSION_ID)
        is_modest = state.get("is_modest", False)
        return cls(received_at, principal_of(request), _request_id(headers), timeout_s, trace, session_id, is_modest)


def ignored_fields(keywords: Sequence[str]) -> dict[str, str]:
    """The header that names keywords of the client's schema, as far as they may stand in one."""
    named = [word for word in keywords if word.isascii() and word.replace("$", "").isalnum()]
    return {IGNORED: ", ".join(named)[:_MAX_IGNORED]} if named else {}


def _request_id(headers: Mapping[str, str]) -> str | None:
    given = headers.get(REQUEST_ID, "")
    return given if 0 < len(given) <= _MAX_ID and all("!" <= char <= "~" for char in given) else None


def _timeout(value: str | None) -> float | None:
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise RequestError(f"the header {TIMEOUT} must be a positive number of seconds", TIMEOUT)
    return seconds


class EchoRequestId:
    """ASGI middleware: the response to a request that brings an id, whatever it is, has the same id."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = _request_id(Headers(scope=scope)) if scope["type"] == "http" else None
        if request_id is None:
            await self._app(scope, receive, send)
            return

        async def echoing(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        await self._app(scope, receive, echoing)


class WithoutRequestId:
    """ASGI middleware: the response has no id. Ray Serve gives each request one, and adds it to the response itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def without(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)[REQUEST_ID]
            await send(message)

        await self._app(scope, receive, without if scope["type"] == "http" else send)
