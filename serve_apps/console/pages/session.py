"""Login, logout, and the static files that every page needs."""

from __future__ import annotations

from pathlib import Path as FilePath
from typing import Annotated

from fastapi import APIRouter, Path, Request
from fastapi.responses import FileResponse, RedirectResponse, Response

from loray.errors import LorayError, NotFoundError
from serve_apps.access import Access
from serve_apps.access.browsers import refuse_other_sites
from serve_apps.console.forms import read_form
from serve_apps.console.rendering import PREFIX, Renderer
from serve_apps.console.sessions import COOKIE, Sessions

_STATIC = FilePath(__file__).parent.parent / "static"
_FILES = {path.name: path for folder in (_STATIC, _STATIC / "vendor") for path in folder.iterdir() if path.is_file()}
_A_DAY = {"Cache-Control": "public, max-age=86400"}


def create_router(access: Access, sessions: Sessions, renderer: Renderer) -> APIRouter:
    router = APIRouter(prefix=PREFIX, route_class=renderer.route_class())

    @router.get("/login")
    def show_login(request: Request) -> Response:
        return renderer.page(request, "login.html", message="")

    @router.post("/login")
    async def log_in(request: Request) -> Response:
        refuse_other_sites(request.headers)
        key = (await read_form(request)).get("key")
        try:
            await access.admit("GET", "identify", {"authorization": f"Bearer {key}"})
        except LorayError as e:
            answer = renderer.refusal(request, e)
            return renderer.page(request, "login.html", answer.status_code, message=str(e))
        sessions.end(request.cookies.get(COOKIE))
        root = request.scope.get("root_path", "") + PREFIX
        response = RedirectResponse(root, 303)
        response.set_cookie(
            COOKIE, sessions.begin(key), path=root, httponly=True, samesite="strict", secure=_is_https(request)
        )
        return response

    @router.post("/logout")
    async def log_out(request: Request) -> Response:
        sessions.end(request.cookies.get(COOKIE))
        root = request.scope.get("root_path", "") + PREFIX
        response = Response(status_code=204, headers={"HX-Redirect": f"{root}/login"})
        response.delete_cookie(COOKIE, path=root, httponly=True, samesite="strict", secure=_is_https(request))
        return response

    @router.get("/static/{name}")
    def get_static(name: Annotated[str, Path(max_length=64)]) -> Response:
        path = _FILES.get(name)
        if path is None:
            raise NotFoundError(f"there is no file {name!r}")
        return FileResponse(path, headers=_A_DAY)

    return router


def _is_https(request: Request) -> bool:
    return "https" in (request.url.scheme, request.headers.get("x-forwarded-proto"))
