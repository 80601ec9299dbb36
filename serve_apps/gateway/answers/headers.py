"""What a request's headers say: whose it is, its id, and how long it may take."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping
from typing import NamedTuple

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loray.errors import RequestError
from loray.spec import Principal

REQUEST_ID = "X-Request-Id"
TENANT = "X-Tenant-Id"  # set by a proxy that knows the client; it overrides the body's `user`
TIMEOUT = "X-Request-Timeout-S"
_MAX_ID = 128


class RequestHeaders(NamedTuple):
    received_at: float  # a time of the event loop
    tenant: str | None = None
    request_id: str | None = None
    timeout_s: float | None = None
    principal: Principal = Principal()

    @classmethod
    def of(cls, headers: Mapping[str, str], principal: Principal) -> RequestHeaders:
        """Raises RequestError if the time is not a positive number. An id that is too long or not visible ASCII counts
        as absent."""
        now = asyncio.get_running_loop().time()
        return cls(now, headers.get(TENANT), _request_id(headers), _timeout(headers.get(TIMEOUT)), principal)


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
