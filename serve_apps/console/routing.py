"""Routers of pages. Their routes are made once a process, as those of the REST API."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from fastapi.routing import APIRoute

from loray.errors import LorayError, SpecError
from serve_apps.console.live.streams import EVENT_STREAM, STREAM_HEADERS, Streams
from serve_apps.console.rendering import PREFIX, Renderer


class PageRoute(APIRoute):
    """A route whose errors are pages. A part at `…/live` is also a stream, for those who accept one: each of its
    events is a look of its own, for which the key is admitted again.
    """

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

        async def streamed(request: Request) -> Response:
            first = await handled(request)
            if first.status_code != 200 or request.headers.get("accept") != EVENT_STREAM:
                return first
            streams: Streams = request.app.state.console.backend.streams
            events = streams.events(_text(first), partial(_look_again, request, handled))
            return StreamingResponse(events, media_type=EVENT_STREAM, headers=STREAM_HEADERS)

        return streamed if self.path.endswith("/live") else handled


async def _look_again(request: Request, handle: Callable[[Request], Awaitable[Response]]) -> str | None:
    """None where the page cannot be looked at any more: the browser asks again, and learns why."""
    try:
        await request.state.admit()
    except LorayError:
        return None
    answer = await handle(request)
    return _text(answer) if answer.status_code == 200 else None


def _text(answer: Response) -> str:
    return bytes(answer.body).decode()


def router_of(path: str) -> APIRouter:
    """A new router of pages below the console's `path`."""
    return APIRouter(prefix=PREFIX + path, route_class=PageRoute, include_in_schema=False)


def _renderer(request: Request) -> Renderer:
    renderer: Renderer = request.app.state.console.renderer
    return renderer


def _first(error: RequestValidationError) -> str:
    wrong = error.errors()[0]
    return f"{'.'.join(str(part) for part in wrong['loc'][1:])}: {wrong['msg']}"
