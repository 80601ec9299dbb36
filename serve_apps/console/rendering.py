"""From a template to a page: what every page shows, its headers, and how errors look."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from fastapi import Request
from fastapi.responses import HTMLResponse, Response
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from loray import __version__
from loray.errors import LorayError, PermissionDenied, Unauthenticated
from loray.serving.access import Action, check
from loray.spec import Principal, format_seconds
from serve_apps.access.reference import PAGE_HEADERS

PREFIX = "/console"
CSRF_HEADER = "x-csrf-token"
_HERE = Path(__file__).parent


class Section(NamedTuple):
    """An entry of the navigation. Who may not do `action` does not see it."""

    path: str
    label: str
    action: Action


SECTIONS = (
    Section("", "Overview", "identify"),
    Section("/adapters", "Adapters", "read"),
    Section("/playground", "Playground", "infer"),
    Section("/jobs", "Training", "follow"),
    Section("/serving", "Serving", "observe"),
    Section("/advice", "Advice", "identify"),
    Section("/usage", "Usage", "identify"),
    Section("/keys", "Keys", "manage_own"),
)


class Renderer:
    """`failed`: the REST API's response to an error, whose status and words pages take over."""

    def __init__(self, failed: Callable[[Exception], Response]) -> None:
        self._failed = failed

    def page(self, request: Request, template: str, status: int = 200, /, **context: Any) -> HTMLResponse:
        state = request.scope.get("state", {})
        principal: Principal | None = state.get("principal")
        session = state.get("session")
        root = root_of(request)
        path = request.url.path.removeprefix(root).rstrip("/")
        shared = {
            "root": root,
            "path": path,
            "principal": principal,
            "has_session": session is not None and session.key is not None,
            "csrf": "" if session is None else session.csrf,
            "sections": [s for s in SECTIONS if principal is not None and is_allowed(principal, s.action)],
            "may": lambda action, owner=None: principal is not None and is_allowed(principal, action, owner),
        }
        html = _templates().get_template(template).render(shared | context)
        return HTMLResponse(html, status, headers=PAGE_HEADERS)

    def refusal(self, request: Request, error: Exception) -> Response:
        """The page of an error, or for a part of a page its message alone. Without a key, the login."""
        answer = self._failed(error)
        status = answer.status_code
        is_told = isinstance(error, LorayError) and status != 500
        message = str(error) if is_told else "internal error; the server's log has the details"
        if isinstance(error, Unauthenticated) and not request.headers.get("hx-request"):
            given = request.scope.get("state", {}).get("authorization") is not None
            return self.page(request, "login.html", 401, message=message if given else "")
        return self.told(request, status, message)

    def told(self, request: Request, status: int, message: str) -> Response:
        """A page with this message, or where a part of a page was asked for, the message alone."""
        template = "parts/message.html" if request.headers.get("hx-request") else "error.html"
        return self.page(request, template, status, message=message)


def root_of(request: Request) -> str:
    """The console's path, behind the application's prefix."""
    root: str = request.scope.get("root_path", "")
    return root + PREFIX


def led_to(request: Request, path: str) -> Response:
    """The answer to a change, after which htmx goes to the page at `path`."""
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
    """Whether a page shows what leads to this action, which its own route checks again."""
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
    """How long, in its largest unit: 3 h"""
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
