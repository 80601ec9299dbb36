"""Cross-origin requests (CORS): which sites' pages may ask the gateway with a key that they have."""

from __future__ import annotations

import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_apps.access.door import Access

ANY = "*"
_PATHS = re.compile(r"/v1/.*|/tokenize|/detokenize")
_HEADER = re.compile(r"[a-z0-9-]{1,64}")
_MOST_HEADERS = 32
_MAX_AGE_S = 600
_TOLD = ("x-", "retry-after")  # how the headers of an answer begin that a page may read


class AllowOrigins:
    """ASGI middleware: says to browsers that pages of `origins` may ask, and answers before keys are looked at whether
    they may (preflight). Cookies are never allowed, and nothing is while a request needs no key.
    """

    def __init__(self, app: ASGIApp, access: Access, origins: frozenset[str]) -> None:
        """`origins` as a browser sends them, https://chat.example; `*`: all."""
        self._app, self._access, self._origins = app, access, origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _PATHS.fullmatch(scope["path"]) or not self._access.needs_key:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        allowed = self._allowed(headers.get("origin"))
        if allowed is not None and scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await _preflight(headers, allowed)(scope, receive, send)
            return

        async def telling(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._tell(MutableHeaders(scope=message), allowed)
            await send(message)

        await self._app(scope, receive, telling)

    def _allowed(self, origin: str | None) -> str | None:
        if ANY in self._origins:
            return ANY
        return origin if origin in self._origins else None

    def _tell(self, headers: MutableHeaders, allowed: str | None) -> None:
        if allowed != ANY:
            headers.add_vary_header("Origin")
        if allowed is not None:
            headers["Access-Control-Allow-Origin"] = allowed
            told = [name for name in headers if name.startswith(_TOLD)]
            headers["Access-Control-Expose-Headers"] = ", ".join(told)


def _preflight(asked: Headers, allowed: str) -> Response:
    names = [name.strip().lower() for name in asked.get("access-control-request-headers", "").split(",")]
    answer = Response(status_code=204)
    answer.headers["Access-Control-Allow-Origin"] = allowed
    answer.headers["Access-Control-Allow-Methods"] = "GET, POST"
    answer.headers["Access-Control-Allow-Headers"] = ", ".join(filter(_HEADER.fullmatch, names[:_MOST_HEADERS]))
    answer.headers["Access-Control-Max-Age"] = str(_MAX_AGE_S)
    answer.headers["Vary"] = "Origin, Access-Control-Request-Headers"
    return answer
