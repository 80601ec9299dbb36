"""The ASGI middleware that puts the principal of a request into its scope, or refuses the request."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Annotated, Any

from fastapi import Depends, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from loray.catalog.audit_chain import Origin, coming_from
from loray.errors import LorayError, Unauthenticated
from loray.serving.access import Action
from loray.spec import Principal
from serve_apps.access.door import HEADERS, Access
from serve_apps.access.permission import Permissions
from serve_apps.access.rates import Rates

_PRINCIPAL, _REVOKED = "principal", "revoked"
_NAMES = {name.encode(): name for name in HEADERS}
_ONCE = frozenset({"authorization", "x-tenant-id", "host", "origin"})  # twice, another server may read the other one


class CheckAccess:
    """ASGI middleware: `scope["state"]["principal"]` is who asks. Nothing behind it looks at keys or tenants' headers.

    `scope["state"]["revoked"]` is a future that is done when the key is revoked or blocked while its request is
    answered. What has no route is passed on: the application says to everybody that it is not there.

    permissions  of the application's routes
    refused      the response to an error, in the application's form
    rates        how often keys and tenants may ask; None: as often as they like
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        permissions: Permissions,
        refused: Callable[[Exception], Response],
        rates: Rates | None = None,
    ) -> None:
        self._app, self._access, self._permissions, self._refused = app, access, permissions, refused
        self._rates = rates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (action := self._permissions.action(scope)) is None:
            await self._app(scope, receive, send)
            return
        with coming_from(_origin_of(scope)):
            try:
                principal = await self._admit(scope, action)
                if self._rates is not None and principal is not None:
                    self._rates.take(principal, time.monotonic())
            except LorayError as e:
                await self._refusal(scope, e)(scope, receive, send)
                return
            state = scope.setdefault("state", {})
            state[_PRINCIPAL] = principal
            with self._access.until_revoked(principal) as state[_REVOKED]:
                await self._app(scope, receive, send)

    async def _admit(self, scope: Scope, action: Action) -> Principal | None:
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


def _origin_of(scope: Scope) -> Origin:
    """The address is that of the connection; behind a proxy, the proxy's."""
    client = scope.get("client")
    return Origin(str(client[0])[:64] if client else None, scope.get("state", {}).get("request_id"))


def principal_of(request: Request) -> Principal:
    """Who asks. For routes that need a key."""
    principal = request.state.principal
    assert isinstance(principal, Principal), "this route is open to all: it has no principal"
    return principal


async def until_revoked(request: Request, parts: AsyncIterator[str]) -> AsyncIterator[str]:
    """The parts of a long answer, which ends where the request's key is revoked or blocked meanwhile."""
    revoked: asyncio.Future[None] = request.state.revoked
    while True:
        coming = asyncio.ensure_future(anext(parts, None))
        either: tuple[asyncio.Future[Any], ...] = (coming, revoked)
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not coming.done():
                coming.cancel()
        if revoked.done() or (part := coming.result()) is None:
            return
        yield part


async def _asking(request: Request) -> Principal:  # FastAPI would call a plain function in a thread
    return principal_of(request)


Asking = Annotated[Principal, Depends(_asking)]
