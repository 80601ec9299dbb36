"""The ASGI middleware that puts the principal of a request into its scope, or refuses the request."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated

from fastapi import Depends, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from loray.errors import LorayError, Unauthenticated
from loray.spec import Principal
from serve_apps.access.door import HEADERS, Access
from serve_apps.access.rates import Rates
from serve_apps.access.rules import Rules

_PRINCIPAL = "principal"
_NAMES = {name.encode(): name for name in HEADERS}
_ONCE = frozenset({"authorization", "x-tenant-id", "host", "origin"})  # twice, another server may read the other one


class CheckAccess:
    """ASGI middleware: `scope["state"]["principal"]` is who asks. Nothing behind it looks at keys or tenants' headers.

    refused  the response to an error, in the application's form
    rates    how often keys and tenants may ask; None: as often as they like
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        rules: Rules,
        refused: Callable[[Exception], Response],
        rates: Rates | None = None,
    ) -> None:
        self._app, self._access, self._rules, self._refused, self._rates = app, access, rules, refused, rates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            try:
                principal = await self._admit(scope)
                if self._rates is not None and principal is not None:
                    self._rates.take(principal, time.monotonic())
            except LorayError as e:
                await self._refusal(scope, e)(scope, receive, send)
                return
            scope.setdefault("state", {})[_PRINCIPAL] = principal
        await self._app(scope, receive, send)

    async def _admit(self, scope: Scope) -> Principal | None:
        action = self._rules.action(scope["method"], scope["path"].removeprefix(scope.get("root_path", "")))
        return await self._access.admit(scope["method"], action, self._headers(scope))

    def _refusal(self, scope: Scope, error: Exception) -> Response:
        return self._refused(error)

    def _headers(self, scope: Scope) -> dict[str, str]:
        headers: dict[str, str] = {}
        for raw, value in scope["headers"]:
            name = _NAMES.get(raw.lower())
            if name is None:
                continue
            if name in headers and name in _ONCE:
                raise Unauthenticated(f"the header {name} comes twice")
            headers[name] = value.decode("latin-1")
        return headers


def principal_of(request: Request) -> Principal:
    """Who asks. For routes that need a key."""
    principal = request.state.principal
    assert isinstance(principal, Principal), "this route is open to all: it has no principal"
    return principal


async def _asking(request: Request) -> Principal:  # FastAPI would call a plain function in a thread
    return principal_of(request)


Asking = Annotated[Principal, Depends(_asking)]
