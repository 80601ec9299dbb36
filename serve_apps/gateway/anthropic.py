"""The form of Anthropic's API that answers have beside their bodies: errors, and headers."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from http import HTTPStatus

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loray.policy.quotas import LIMIT
from loray.schemas.anthropic import ErrorAnswer, ErrorCode, ErrorDetail, error_type
from loray.schemas.openai import Error
from serve_apps.gateway import errors
from serve_apps.http import REQUEST_ID, path_of

_VERSION = b"anthropic-version"
_PATH = "/v1/messages"
OVERLOADED, USED_UP = 529, 402
_SPAN = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:([\d.]+)s)?")  # as `loray.policy.quotas.span` writes it


def is_spoken(scope: Scope) -> bool:
    """Tell whether a request is of Anthropic's API: by its path, or by the header that its clients always send."""
    path = path_of(scope)
    return path == _PATH or path.startswith(f"{_PATH}/") or any(name == _VERSION for name, _ in scope["headers"])


def status_of(status: int, error: Error, headers: Mapping[str, str]) -> int:
    """The status that Anthropic has for an error of ours: 529 where it helps to ask again, 402 for a used-up budget."""
    if status == HTTPStatus.SERVICE_UNAVAILABLE or error.code == "overloaded":
        return OVERLOADED
    return USED_UP if status == HTTPStatus.TOO_MANY_REQUESTS and headers.get(LIMIT) == "budget" else status


class AnthropicForm:
    """ASGI middleware: gives answers to requests of Anthropic's API its headers, and errors its form."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not is_spoken(scope):
            await self._app(scope, receive, send)
            return
        form = _Form(send)
        try:
            await self._app(scope, receive, form.send)
        except Exception as e:
            if not form.started:  # else nothing can be said any more
                await errors.response_of(errors.failure_of(e))(scope, receive, form.send)
            raise


class _Form:
    """One answer. An error is held back until its body is complete."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._error: Message | None = None
        self._body = bytearray()
        self.started = False

    async def send(self, message: Message) -> None:
        self.started = True
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=list(message["headers"]))
            headers["request-id"] = headers.get(REQUEST_ID) or f"req_{secrets.token_hex(12)}"
            for name, value in _limits(headers):
                headers[name] = value
            message = {**message, "headers": headers.raw}
            if message["status"] >= HTTPStatus.BAD_REQUEST:
                self._error = message
                return
        elif self._error is not None:
            self._body += message.get("body", b"")
            if message.get("more_body", False):
                return
            start, body = _in_form(self._error, bytes(self._body))
            self._error = None
            await self._send(start)
            message = {**message, "body": body}
        await self._send(message)


def _in_form(start: Message, body: bytes) -> tuple[Message, bytes]:
    headers = MutableHeaders(raw=list(start["headers"]))
    try:
        error = Error.model_validate(json.loads(body)["error"])
    except (ValueError, TypeError, KeyError):
        return start, body  # of no error object, as for a client that has left
    status = status_of(start["status"], error, headers)
    message = error.message
    if error.code == "context_length_exceeded":
        message = f"prompt is too long: {message}"  # by which agents know that they must shorten the conversation
    detail = ErrorDetail(type=error_type(status), message=message)
    if error.code is not None:
        detail = detail.model_copy(update={"details": ErrorCode(error_code=error.code)})
    written = ErrorAnswer(type="error", error=detail, request_id=headers["request-id"]).to_json().encode()
    headers["content-length"] = str(len(written))
    return {**start, "status": status, "headers": headers.raw}, written


def _limits(headers: Headers) -> Iterator[tuple[str, str]]:
    """Anthropic's headers of limits, made of OpenAI's, which say in what time a limit is full, and these when."""
    for kind in ("requests", "tokens"):
        for what in ("limit", "remaining", "reset"):
            value = headers.get(f"x-ratelimit-{what}-{kind}")
            if value is not None:
                yield f"anthropic-ratelimit-{kind}-{what}", _moment(value) if what == "reset" else value


def _moment(span: str) -> str:
    """The time after `span` as RFC 3339 writes it, to the second; less than a second is none."""
    found = _SPAN.fullmatch(span)
    hours, minutes, seconds = (float(part or 0) for part in found.groups()) if found else (0.0, 0.0, 0.0)
    at = datetime.now(UTC) + timedelta(hours=hours, minutes=minutes, seconds=seconds)
    return at.strftime("%Y-%m-%dT%H:%M:%SZ")
