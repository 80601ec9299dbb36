"""Sessions of browsers: the check of each page, login and logout, and the files that pages load."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from functools import partial
from pathlib import Path as FilePath
from typing import Annotated

from fastapi import Path, Request
from fastapi.responses import FileResponse, RedirectResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.types import ASGIApp, Scope

from loray.errors import LorayError, NotFoundError, PermissionDenied
from loray.policy.auth import Action
from loray.spec import Principal
from serve_apps.auth import (
    Authenticate,
    Authenticator,
    CurrentPrincipal,
    Permissions,
    RateLimits,
    may,
    refuse_cross_site,
)
from serve_apps.console.backend import COOKIE, ConsoleDep, Sessions
from serve_apps.console.rendering import CSRF_HEADER, PREFIX, Renderer, led_to, page_router, read_form, root_of
from serve_apps.http import path_of

_READS = frozenset({"GET", "HEAD", "OPTIONS"})
_LOGIN = f"{PREFIX}/login"
_STATIC = FilePath(__file__).parent / "static"
_FILES = {path.name: path for folder in (_STATIC, _STATIC / "vendor") for path in folder.iterdir() if path.is_file()}
_A_DAY = {"Cache-Control": "public, max-age=86400"}

router = page_router()


class CheckConsole(Authenticate):
    """`Authenticate` that also knows sessions. `scope["state"]` of a page has its `session`, its `authorization`, and
    `admit`, which checks all this again and raises where the caller may not see the page any more.

    The API's own routes take no cookies, so what a browser does by itself reaches pages alone. A page that changes
    something must repeat the session's token, which other sites cannot read.
    """

    def __init__(
        self,
        app: ASGIApp,
        access: Authenticator,
        permissions: Permissions,
        refused: Callable[[Exception], Response],
        rates: RateLimits,
        sessions: Sessions,
        renderer: Renderer,
    ) -> None:
        super().__init__(app, access, permissions, refused, rates)
        self._sessions, self._renderer = sessions, renderer

    async def _admit(self, scope: Scope, action: Action) -> Principal | None:
        path = path_of(scope)
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
        if not _is_page(path_of(scope)):
            return super()._refusal(scope, error)
        return self._renderer.refusal(Request(scope), error)


def _is_page(path: str) -> bool:
    return path == PREFIX or path.startswith(f"{PREFIX}/")


@router.get("/login")
@may("open")
def show_login(console: ConsoleDep, request: Request) -> Response:
    return console.renderer.page(request, "login.html", message="")


@router.post("/login")
@may("open")
async def log_in(console: ConsoleDep, request: Request) -> Response:
    refuse_cross_site(request.headers)
    key = (await read_form(request)).get("key")
    try:
        principal = await console.access.admit("GET", "identify", {"authorization": f"Bearer {key}"})
        assert principal is not None
        cookie = await run_in_threadpool(console.sessions.begin, key, principal)
    except LorayError as e:
        answer = console.renderer.refusal(request, e)
        return console.renderer.page(request, "login.html", answer.status_code, message=str(e))
    await run_in_threadpool(console.sessions.end, request.cookies.get(COOKIE), principal)
    root = root_of(request)
    response = RedirectResponse(root, 303)
    response.set_cookie(COOKIE, cookie, path=root, httponly=True, samesite="strict", secure=_is_https(request))
    return response


@router.post("/logout")
@may("identify")
def log_out(console: ConsoleDep, request: Request, asking: CurrentPrincipal) -> Response:
    console.sessions.end(request.cookies.get(COOKIE), asking)
    response = led_to(request, "/login")
    response.delete_cookie(COOKIE, path=root_of(request), httponly=True, samesite="strict", secure=_is_https(request))
    return response


@router.get("/static/{name}")
@may("open")
def get_static(name: Annotated[str, Path(max_length=64)]) -> Response:
    path = _FILES.get(name)
    if path is None:
        raise NotFoundError(f"there is no file {name!r}")
    return FileResponse(path, headers=_A_DAY)


def _is_https(request: Request) -> bool:
    return "https" in (request.url.scheme, request.headers.get("x-forwarded-proto"))
