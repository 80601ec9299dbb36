"""Pages from templates, their errors, the parts of them that are streamed, and forms."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qs

from fastapi import APIRouter, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from pydantic import BaseModel, ValidationError

from loray import __version__
from loray.errors import LorayError, PermissionDenied, SpecError, Unauthenticated
from loray.policy.auth import Action, check
from loray.spec import Principal, format_seconds
from serve_apps.auth import PAGE_HEADERS

PREFIX = "/console"
CSRF_HEADER = "x-csrf-token"
EVENT_STREAM = "text/event-stream"
STREAM_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}  # nginx would collect the events
MOST_SUGGESTED = 200  # bases beside a field, which takes the names of others too
_MOST_FIELDS = 200
_INTERVAL_S = 3.0
_LENGTH_S = 15.0  # after which the browser asks again: a server that stops waits no longer for its pages
_HERE = Path(__file__).parent

T = TypeVar("T", bound=BaseModel)


class Section(NamedTuple):
    """An entry of the navigation. Who may not do `action` does not see it. `of_files`: nor who is where no files are
    kept.
    """

    path: str
    label: str
    action: Action
    of_files: bool = False


SECTIONS = (
    Section("", "Overview", "identify"),
    Section("/adapters", "Adapters", "read"),
    Section("/playground", "Playground", "infer"),
    Section("/files", "Files", "files", of_files=True),
    Section("/batches", "Batches", "batch", of_files=True),
    Section("/jobs", "Training", "follow"),
    Section("/sessions", "Training sessions", "follow"),
    Section("/serving", "Serving", "observe"),
    Section("/usage", "Usage", "identify"),
    Section("/keys", "Keys", "manage_own"),
)


class Renderer:
    """Renders pages. `failed`: the REST API's response to an error, whose status and words pages take over."""

    def __init__(self, failed: Callable[[Exception], Response]) -> None:
        self._failed = failed

    def page(self, request: Request, template: str, status: int = 200, /, **context: Any) -> HTMLResponse:
        state = request.scope.get("state", {})
        principal: Principal | None = state.get("principal")
        session = state.get("session")
        root = root_of(request)
        path = request.url.path.removeprefix(root).rstrip("/")
        keeps_files = request.app.state.console.backend.settings.files
        shared = {
            "root": root,
            "path": path,
            "principal": principal,
            "has_session": session is not None and session.key is not None,
            "csrf": "" if session is None else session.csrf,
            "sections": [
                s
                for s in SECTIONS
                if principal is not None and is_allowed(principal, s.action) and (keeps_files or not s.of_files)
            ],
            "may": lambda action, owner=None: principal is not None and is_allowed(principal, action, owner),
        }
        html = _templates().get_template(template).render(shared | context)
        return HTMLResponse(html, status, headers=PAGE_HEADERS)

    def followed(self, request: Request, template: str, /, **context: Any) -> HTMLResponse:
        """Render the page, or where its route ends with /live, the part of it that the browser follows."""
        is_part = request.scope["route"].path.endswith("/live")
        return self.page(request, f"parts/{template}" if is_part else template, **context)

    def refusal(self, request: Request, error: Exception) -> Response:
        """Answer with an error's page, for a part of a page with its message alone; without a key, with the login."""
        answer = self._failed(error)
        status = answer.status_code
        is_told = isinstance(error, LorayError) and status != 500
        message = str(error) if is_told else "internal error; the server's log has the details"
        if isinstance(error, Unauthenticated) and not request.headers.get("hx-request"):
            given = request.scope.get("state", {}).get("authorization") is not None
            return self.page(request, "login.html", 401, message=message if given else "")
        return self.told(request, status, message)

    def told(self, request: Request, status: int, message: str) -> Response:
        """Answer with a page that has this message, or where a part of a page was asked for, with the message alone."""
        template = "parts/message.html" if request.headers.get("hx-request") else "error.html"
        return self.page(request, template, status, message=message)


def root_of(request: Request) -> str:
    """Return the console's path, behind the application's prefix."""
    root: str = request.scope.get("root_path", "")
    return root + PREFIX


def led_to(request: Request, path: str) -> Response:
    """Answer a change, after which htmx goes to the page at `path`."""
    return Response(status_code=204, headers={"HX-Redirect": root_of(request) + path})


@cache
def _templates() -> Environment:
    """The templates of this process, each compiled at its first use."""
    templates = Environment(
        loader=FileSystemLoader(_HERE / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    templates.filters |= {"size": size, "ago": ago, "number": number, "day": day, "duration": duration}
    templates.globals |= {"loray_version": __version__}
    return templates


def is_allowed(principal: Principal, action: Action, owner: str | None = None) -> bool:
    """Tell whether a page shows what leads to this action, which its own route checks again."""
    try:
        check(principal, action, owner)
    except PermissionDenied:
        return False
    return True


def size(num_bytes: float) -> str:
    """12.3 MiB"""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024 or unit == "GiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"


def number(value: float) -> str:
    """12,345"""
    return f"{value:,.0f}"


def day(moment: datetime | float | None) -> str:
    """2026-01-31 12:00 UTC"""
    if isinstance(moment, int | float):
        moment = datetime.fromtimestamp(moment, UTC)
    return "–" if moment is None else f"{moment:%Y-%m-%d %H:%M} UTC"


def duration(seconds: float | None) -> str:
    """12.3 ms"""
    return "–" if seconds is None else format_seconds(seconds)


def ago(seconds: float) -> str:
    """3 h"""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


class Streams:
    """The streams of a process. Used from one event loop; `end` also from a signal's handler in it.

    interval_s  between two looks
    length_s    of a stream
    """

    def __init__(self, interval_s: float = _INTERVAL_S, length_s: float = _LENGTH_S) -> None:
        self._interval_s, self._length_s = interval_s, length_s
        self._ended = asyncio.Event()

    def end(self) -> None:
        """End all streams; those that begin later have one event."""
        self._ended.set()

    async def events(self, first: str, look: Callable[[], Awaitable[str | None]]) -> AsyncIterator[str]:
        """Give an event with the part at the beginning, and one whenever it has changed; a comment where it has not, so
        that a connection which has broken is noticed. Ends where `look` has None.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + self._length_s
        part: str | None = first
        shown = None
        while part is not None:
            yield f"data: {json.dumps(part)}\n\n" if part != shown else ": the same\n\n"
            shown = part
            if loop.time() + self._interval_s > until or await self._has_ended():
                return
            part = await look()

    async def _has_ended(self) -> bool:
        """Wait for the interval, or until the end."""
        try:
            async with asyncio.timeout(self._interval_s):
                await self._ended.wait()
        except TimeoutError:
            return False
        return True


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


def page_router() -> APIRouter:
    """Make a router of pages, whose paths are below the console's."""
    return APIRouter(prefix=PREFIX, route_class=PageRoute, include_in_schema=False)


def _renderer(request: Request) -> Renderer:
    renderer: Renderer = request.app.state.console.renderer
    return renderer


def _first(error: RequestValidationError) -> str:
    wrong = error.errors()[0]
    return f"{'.'.join(str(part) for part in wrong['loc'][1:])}: {wrong['msg']}"


class Form:
    def __init__(self, fields: dict[str, list[str]]) -> None:
        self._fields = fields

    def get(self, name: str) -> str:
        """Return the field's text without spaces around it; empty where it is not there."""
        return self._fields.get(name, [""])[-1].strip()

    def all(self, name: str) -> tuple[str, ...]:
        return tuple(value.strip() for value in self._fields.get(name, []) if value.strip())


async def read_form(request: Request) -> Form:
    """Read a form, or an object of JSON. Raises SpecError for anything else."""
    body = await request.body()
    try:
        if request.headers.get("content-type", "").startswith("application/json"):
            given = json.loads(body or b"{}")
            if not isinstance(given, dict):
                raise SpecError("the body is no object")
            return Form({k: [str(x) for x in v] if isinstance(v, list) else [str(v)] for k, v in given.items()})
        return Form(parse_qs(body.decode(), keep_blank_values=True, max_num_fields=_MOST_FIELDS))
    except ValueError as e:
        raise SpecError(f"the form cannot be read: {e}") from e


def checked(model: type[T], given: dict[str, Any]) -> T:
    """Make a `model` of what was given. Raises SpecError that names each wrong field."""
    try:
        return model.model_validate(given)
    except ValidationError as e:
        wrong = "; ".join(f"{'.'.join(map(str, error['loc']))}: {error['msg']}" for error in e.errors())
        raise SpecError(wrong) from e
