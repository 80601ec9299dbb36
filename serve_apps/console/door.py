"""The check of access for pages too: a session's cookie stands for its key below /console, and nowhere else."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from functools import partial

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Scope

from loray.errors import PermissionDenied
from loray.serving.access import Action
from loray.spec import Principal
from serve_apps.access import Access, CheckAccess, Permissions
from serve_apps.access.rates import Rates
from serve_apps.console.rendering import CSRF_HEADER, PREFIX, Renderer
from serve_apps.console.sessions import COOKIE, Sessions

_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_LOGIN = f"{PREFIX}/login"


class CheckConsole(CheckAccess):
    """`CheckAccess` that also knows sessions. `scope["state"]` of a page has its `session`, its `authorization`, and
    `admit`, which checks all this again and raises where the caller may not see the page any more.

    The API's own routes take no cookies, so what a browser does by itself reaches pages alone. A page that changes
    something must repeat the session's token, which other sites cannot read.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Access,
        permissions: Permissions,
        refused: Callable[[Exception], Response],
        rates: Rates,
        sessions: Sessions,
        renderer: Renderer,
    ) -> None:
        super().__init__(app, access, permissions, refused, rates)
        self._sessions, self._renderer = sessions, renderer

    async def _admit(self, scope: Scope, action: Action) -> Principal | None:
        path = _path(scope)
        if not _is_page(path):
            return await super()._admit(scope, action)
        request, headers = Request(scope), self._headers(scope)
        given = headers.get("authorization")
        session = None
        if given is None and (cookie := request.cookies.get(COOKIE)) is not None:
            session = await run_in_threadpool(self._sessions.find, cookie)
        if session is not None and session.key is not None:
            headers["authorization"] = f"Bearer {session.key}"
        state = scope.setdefault("state", {})
        state["authorization"] = headers.get("authorization")
        state["admit"] = partial(self._admit_again, scope, action)
        principal = await self._access.admit(scope["method"], action, headers)
        if session is None and given is None and principal is not None:
            session = self._sessions.keyless
        state["session"] = session
        if scope["method"] not in _READS and path != _LOGIN and session is not None:
            token = request.headers.get(CSRF_HEADER, "")
            if not hmac.compare_digest(token.encode(), session.csrf.encode()):
                raise PermissionDenied("this page is of an earlier session, or of another site: load it again")
        return principal

    async def _admit_again(self, scope: Scope, action: Action) -> None:
        scope["state"]["principal"] = await self._admit(scope, action)

    def _refusal(self, scope: Scope, error: Exception) -> Response:
        if not _is_page(_path(scope)):
            return super()._refusal(scope, error)
        return self._renderer.refusal(Request(scope), error)


def _path(scope: Scope) -> str:
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def _is_page(path: str) -> bool:
    return path == PREFIX or path.startswith(f"{PREFIX}/")
