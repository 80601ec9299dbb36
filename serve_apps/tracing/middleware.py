"""ASGI middleware: a span for each request that generates. It is there only where traces are exported."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from serve_apps.tracing.spans import Tracing

_OPERATIONS = {"/v1/completions": "text_completion", "/v1/chat/completions": "chat", "/v1/responses": "chat"}


class TraceRequests:
    """The span is `scope["state"]["trace"]`, until the response has ended."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app, self._tracing = app, tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = scope["path"].removeprefix(scope.get("root_path", "")) if scope["type"] == "http" else None
        if route not in _OPERATIONS:
            await self._app(scope, receive, send)
            return
        headers, state = Headers(scope=scope), scope.setdefault("state", {})
        trace = self._tracing.request(_OPERATIONS[route], route, headers.get("traceparent"), headers.get("tracestate"))
        state["trace"] = trace
        try:
            await self._app(scope, receive, trace.sending(send))
        finally:
            trace.end(state.get("usage"))
