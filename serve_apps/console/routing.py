"""Routers of pages. Their routes are made once a process, as those of the REST API."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import APIRoute

from loray.errors import LorayError, SpecError
from serve_apps.console.rendering import PREFIX, Renderer


class PageRoute(APIRoute):
    """A route whose errors are pages."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            try:
                return await handle(request)
            except LorayError as e:
                error = e
            except RequestValidationError as e:
                error = SpecError(_first(e))
            except HTTPException as e:  # the body is too long
                return _renderer(request).told(request, e.status_code, e.detail)
            return _renderer(request).refusal(request, error)

        return handled


def router_of(path: str) -> APIRouter:
    """A new router of pages below the console's `path`."""
    return APIRouter(prefix=PREFIX + path, route_class=PageRoute, include_in_schema=False)


def _renderer(request: Request) -> Renderer:
    renderer: Renderer = request.app.state.console.renderer
    return renderer


def _first(error: RequestValidationError) -> str:
    wrong = error.errors()[0]
    return f"{'.'.join(str(part) for part in wrong['loc'][1:])}: {wrong['msg']}"
