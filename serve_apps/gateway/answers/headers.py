"""Headers of a request: its id, how long it may take, its session; and those of the gateway's own answers."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from fastapi import Request
from starlette.datastructures import MutableHeaders

from loray.errors import RequestError, shown
from loray.schemas.openai.fields import NAME
from loray.spec import Principal
from serve_apps.auth import AS_BATCH, principal_of
from serve_apps.http import request_id_of
from serve_apps.tracing import RequestSpan

TIMEOUT = "X-Request-Timeout-S"
SESSION_ID = "X-Session-ID"
PRIORITY = "X-Loray-Priority"  # of the response: the priority that was applied, where one was asked or it is not 0
STRICT = "X-Loray-Strict"  # true: unknown fields of the body are refused
IGNORED = "X-Loray-Ignored-Fields"  # of the response: unknown fields, and keywords of a schema that answers may violate
ADAPTER = "X-Adapter-Version"  # of the response: which version has answered, as `name@version`
_MAX_IGNORED = 10  # names


class RequestHeaders(NamedTuple):
    """`received_at` is a time of the event loop; `principal` is who asks, as the keys' middleware found it; `trace` the
    request's span, where traces are exported; `session_id` what the client calls the session; `is_batch`:
    it is a line of a batch, which waits behind all people, however long.
    """

    received_at: float
    principal: Principal = Principal()
    request_id: str | None = None
    timeout_s: float | None = None
    trace: RequestSpan | None = None
    session_id: str | None = None
    is_batch: bool = False

    @classmethod
    def of(cls, request: Request) -> RequestHeaders:
        """Read the headers. Raises RequestError if the time is not a positive number. An id that is too long or not
        visible ASCII counts as absent.
        """
        state, headers = request.scope.get("state", {}), request.headers
        received_at, trace = state.get("received_at", asyncio.get_running_loop().time()), state.get("trace")
        timeout_s, session_id = _timeout(headers.get(TIMEOUT)), headers.get(SESSION_ID)
        request_id, is_batch = request_id_of(headers), AS_BATCH in state
        return cls(received_at, principal_of(request), request_id, timeout_s, trace, session_id, is_batch)


def ignored_fields(keywords: Sequence[str]) -> dict[str, str]:
    """The header that names fields, and keywords of the client's schema, as far as they may stand in one."""
    named = [word for word in keywords if NAME.fullmatch(word)]
    return {IGNORED: ", ".join(named[:_MAX_IGNORED])} if named else {}


def tell_ignored(headers: MutableHeaders, names: Iterable[str]) -> None:
    """Add names of the body's fields to those that the header has already."""
    told = [name for name in headers.get(IGNORED, "").split(", ") if name]
    headers[IGNORED] = ", ".join([*told, *names][:_MAX_IGNORED])


def is_strict(headers: Mapping[str, str]) -> bool:
    """Tell whether the request wants unknown fields refused. Raises RequestError for what is neither yes nor no."""
    value = headers.get(STRICT, "false").strip().lower()
    if value not in ("true", "false"):
        raise RequestError(f"the header {STRICT} must be true or false, not {shown(value)}", STRICT)
    return value == "true"


def _timeout(value: str | None) -> float | None:
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise RequestError(f"the header {TIMEOUT} must be a positive number of seconds", TIMEOUT)
    return seconds
