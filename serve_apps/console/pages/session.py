"""Login, logout, and the static files that every page needs."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Annotated

from fastapi import Path, Request
from fastapi.responses import FileResponse, RedirectResponse, Response
from starlette.concurrency import run_in_threadpool

from loray.errors import LorayError, NotFoundError
from serve_apps.access import Asking, may
from serve_apps.access.browsers import refuse_other_sites
from serve_apps.console.backend import ConsoleDep
from serve_apps.console.forms import read_form
from serve_apps.console.rendering import led_to, root_of
from serve_apps.console.routing import router_of
from serve_apps.console.sessions import COOKIE

_STATIC = FilePath(__file__).parent.parent / "static"
_FILES = {path.name: path for folder in (_STATIC, _STATIC / "vendor") for path in folder.iterdir() if path.is_file()}
_A_DAY = {"Cache-Control": "public, max-age=86400"}

router = router_of("")


@router.get("/login")
@may("open")
def show_login(console: ConsoleDep, request: Request) -> Response:
    return console.renderer.page(request, "login.html", message="")


@router.post("/login")
@may("open")
async def log_in(console: ConsoleDep, request: Request) -> Response:
    refuse_other_sites(request.headers)
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
def log_out(console: ConsoleDep, request: Request, asking: Asking) -> Response:
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
