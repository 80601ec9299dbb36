"""HTTP for both applications: errors, request ids, the OpenAPI document, and bodies that are limited while they come.

Python's JSON parser holds the interpreter's lock from beginning to end, so the limits bound how long a body can delay
other requests: about 30 ms for the worst one that is taken. Longer bodies are parsed in a thread.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterable, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loray.errors import LorayError
from serve_apps.auth import AS_BATCH

T = TypeVar("T")

CLIENT_LEFT = 499  # nginx's status for a client that has disconnected; only metrics show it
REQUEST_ID = "X-Request-Id"
MAX_DEPTH = 64
MAX_MEMBERS = 2048  # of one object
MAX_ARRAYS_AND_OBJECTS = 1 << 15
MAX_VALUES = 5 << 16  # room for 300,000 token ids, which are embedded together
INLINE_BYTES = 64 << 10  # bodies up to this size are parsed in the event loop: at most a few milliseconds
BODY_S = 30.0  # for a body to come, and a second more for each BODY_BYTES_PER_S that have come
BODY_BYTES_PER_S = 16 << 10
_MAX_ID = 128  # characters
_REFERENCE = "#/components/schemas/{model}"
_TOO_SLOW = "the request's body came too slowly; send it at once"
_WRITE_BYTES = 1 << 20
_BACKSLASH, _QUOTE, _COMMA = b"\\\\", b'\\"', ord(",")
_STEPS = np.zeros(256, dtype=np.int32)  # in depth, by character
_STEPS[list(b"[{")] = 1
_STEPS[list(b"]}")] = -1
_threads = ThreadPoolExecutor(1, thread_name_prefix="bodies")


def install_error_handlers(
    app: FastAPI,
    *,
    failed: Callable[[Exception], Response],
    invalid: Callable[[RequestValidationError], LorayError],
    refused: Callable[[int, str], Response],
) -> None:
    """Turn every error of `app` into a response of its format.

    failed   response for an error that a route raised
    invalid  error for parameters that FastAPI found invalid
    refused  response for a status and a message, for instance of an unknown URL
    """

    @app.exception_handler(LorayError)
    @app.exception_handler(Exception)
    async def on_error(_: Request, error: Exception) -> Response:
        return failed(error)

    @app.exception_handler(ClientDisconnect)
    async def on_disconnect(_: Request, __: Exception) -> Response:
        return Response(status_code=CLIENT_LEFT)  # which nobody reads

    @app.exception_handler(RequestValidationError)
    async def on_validation_error(_: Request, error: RequestValidationError) -> Response:
        return failed(invalid(error))

    @app.exception_handler(HTTPException)
    async def on_http_error(request: Request, error: HTTPException) -> Response:
        headers = dict(error.headers or {})
        if error.status_code == 405:
            headers["Allow"] = _allowed(app, request)
            if request.method == "OPTIONS":
                return Response(status_code=204, headers=headers)
        messages = {
            404: f"Invalid URL ({request.method} {request.url.path})",
            405: f"{request.method} is not allowed for {request.url.path}",
        }
        response = refused(error.status_code, messages.get(error.status_code, str(error.detail)))
        response.headers.update(headers)
        return response


def _allowed(app: FastAPI, request: Request) -> str:
    """List the methods of a path's routes, each of which has one."""
    at_path = (r for r in app.routes if isinstance(r, Route) and r.matches(request.scope)[0] is not Match.NONE)
    return ", ".join(sorted({method for route in at_path for method in route.methods or ()}))


def request_id_of(headers: Mapping[str, str]) -> str | None:
    """Return the client's id of a request; None where it gives none, or one that is too long or not visible ASCII."""
    given = headers.get(REQUEST_ID, "")
    return given if 0 < len(given) <= _MAX_ID and all("!" <= char <= "~" for char in given) else None


def path_of(scope: Scope) -> str:
    """Return the path of a request in its application, whatever it is mounted at."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def new_request_id() -> str:
    return f"req-{secrets.token_hex(8)}"


class EchoRequestId:
    """ASGI middleware: the response to a request that brings an id, whatever it is, has the same id.
    `scope["state"]["request_id"]` is that.

    make  an id where the request brings none; None: the application itself gives its response one
    """

    def __init__(self, app: ASGIApp, make: Callable[[], str] | None = None) -> None:
        self._app, self._make = app, make

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request_id = None
        if scope["type"] == "http":
            request_id = request_id_of(Headers(scope=scope)) or (self._make and self._make())
        if request_id is None:
            await self._app(scope, receive, send)
            return
        scope.setdefault("state", {})["request_id"] = request_id

        async def echoing(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = request_id
            await send(message)

        await self._app(scope, receive, echoing)


class WithoutRequestId:
    """ASGI middleware: the response has no id. Ray Serve gives each request one, and adds it to the response itself.
    Lines of batches do not come through it, and keep theirs.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def without(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)[REQUEST_ID]
            await send(message)

        is_of_serve = scope["type"] == "http" and AS_BATCH not in scope.get("state", {})
        await self._app(scope, receive, without if is_of_serve else send)


def schema_reference(name: str) -> dict[str, str]:
    """Refer to a schema of the OpenAPI document."""
    return {"$ref": _REFERENCE.format(model=name)}


def extend_openapi(
    app: FastAPI,
    schemas: Sequence[tuple[type[BaseModel], JsonSchemaMode]],
    edit: Callable[[dict[str, Any]], None] = lambda document: None,
) -> None:
    """Add `schemas` of models that no route declares to the app's OpenAPI document, then calls `edit` with it."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            _, definitions = models_json_schema(schemas, ref_template=_REFERENCE)
            document.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
            edit(document)
        return generate()

    app.openapi = openapi  # type: ignore[method-assign]


class BodyLimit:
    """ASGI middleware: a request whose body is larger than its `max_bytes` gets 413 from the error handlers of the app,
    and one whose body comes slower than BODY_S and BODY_BYTES_PER_S allow gets 408.

    It gets 413 before its body is read if Content-Length says the size, else as soon as that many bytes have come.
    `advice` follows the limit in the message.
    """

    def __init__(self, app: ASGIApp, max_bytes: Callable[[Scope], int], advice: str) -> None:
        self._app, self._max_bytes, self._advice = app, max_bytes, advice

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        limit = self._max_bytes(scope)
        length = dict(scope["headers"]).get(b"content-length", b"0")
        num_bytes, due, is_whole = 0, 0.0, False
        is_too_long = not length.isdigit() or len(length) > 18 or int(length) > limit

        async def counted() -> Message:
            nonlocal num_bytes, due, is_whole
            if is_whole:  # what comes now is that the client leaves
                return await receive()
            if not is_too_long:
                due = due or asyncio.get_running_loop().time() + BODY_S
                try:
                    async with asyncio.timeout_at(due + num_bytes / BODY_BYTES_PER_S):
                        message = await receive()
                except TimeoutError as e:
                    raise HTTPException(408, _TOO_SLOW, {"Connection": "close"}) from e
                num_bytes += len(message.get("body", b""))
                is_whole = not message.get("more_body", False)
            if is_too_long or num_bytes > limit:
                raise HTTPException(413, f"the request's body is larger than {_size(limit)}; {self._advice}")
            return message

        await self._app(scope, counted, send)


async def read(request: Request, parse: Callable[[bytes], T]) -> T:
    """Return `parse` of the body, in a thread if it is long."""
    raw = await request.body()
    if len(raw) <= INLINE_BYTES:
        return parse(raw)
    return await asyncio.get_running_loop().run_in_executor(_threads, parse, raw)


def length_of(request: Request, limit: int) -> int:
    """Return the length of a file's body. Answers 411 where the request does not say it, 413 where it is too much."""
    length = request.headers.get("content-length")
    if length is None:
        raise HTTPException(411, "send the file with its length in the header Content-Length")
    if int(length) > limit:  # BodyLimit has checked that it is a number
        raise HTTPException(413, f"a file of this name has at most {limit:,} bytes")
    return int(length)


async def receive_file(request: Request, path: Path, num_bytes: int, keep: Callable[[Path], T]) -> T:
    """Return `keep` of the body, written to the new file `path`. Answers 413 beyond its `num_bytes`."""
    with path.open("wb") as f:
        await _write(request, f, num_bytes)
    return await run_in_threadpool(keep, path)


async def _write(request: Request, f: BinaryIO, limit: int) -> None:
    num_bytes, pending = 0, bytearray()
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > limit:
            raise HTTPException(413, f"the file is longer than the {limit:,} bytes of its Content-Length")
        pending += chunk
        if len(pending) >= _WRITE_BYTES:
            await run_in_threadpool(f.write, bytes(pending))
            pending.clear()
    await run_in_threadpool(f.write, bytes(pending))


class HeldResponse(StreamingResponse):
    """A body in pieces. `held` is closed at the end, also where the client leaves."""

    def __init__(
        self,
        pieces: AsyncIterable[str | bytes] | Iterable[str | bytes],
        held: AsyncExitStack,
        *,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        media_type: str,
    ) -> None:
        super().__init__(pieces, status, headers, media_type)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._held.aclose()


def parse_json(raw: str | bytes) -> Any:
    """Parse JSON as RFC 8259 defines it: unlike `json.loads`, without NaN, Infinity and halves of surrogate pairs.

    Raises ValueError, also for JSON that is nested deeper or has more parts than the limits of this module.
    """
    text = raw if isinstance(raw, str) else raw.decode(json.detect_encoding(raw))
    check_shape(text)
    value = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_object)
    if "\\ud" in text or "\\uD" in text:  # half a pair is valid JSON, but not valid text
        json.dumps(value, ensure_ascii=False).encode()
    return value


def check_shape(text: str) -> None:
    """Raise ValueError if a JSON text is nested too deep or has too many parts.

    It takes a few passes of numpy, which lets other threads run: a body as large as may be takes some milliseconds.
    """
    openings = text.count("[") + text.count("{")  # also those in strings, hence more than there are
    if openings <= MAX_DEPTH and text.count(",") + openings < MAX_VALUES:
        return
    outside = _outside_strings(text)
    steps = _STEPS[outside]
    if np.cumsum(steps, dtype=np.int32).max(initial=0) > MAX_DEPTH:
        raise ValueError(f"it is nested deeper than {MAX_DEPTH} levels")
    containers = np.count_nonzero(steps > 0)
    if containers > MAX_ARRAYS_AND_OBJECTS:
        raise ValueError(f"it has more than {MAX_ARRAYS_AND_OBJECTS:,} arrays and objects")
    if containers + np.count_nonzero(outside == _COMMA) > MAX_VALUES:
        raise ValueError(f"it has more than {MAX_VALUES:,} values")


def _outside_strings(text: str) -> npt.NDArray[np.uint8]:
    """Return the bytes that are in no string, closed or not, and the quotes that close strings. From the left, pairs of
    backslashes are no escapes, and then a backslash before a quote is one.
    """
    raw = text.encode(errors="replace").replace(_BACKSLASH, b"  ").replace(_QUOTE, b"  ")
    characters = np.frombuffer(raw, dtype=np.uint8)
    return characters[~np.logical_xor.accumulate(characters == ord('"'))]


def _size(num_bytes: int) -> str:
    """Format a limit, which is a power of two, unlike the sizes that `format_size` shows."""
    return f"{num_bytes / (1 << 20):g} MiB" if num_bytes >= 1 << 20 else f"{num_bytes / (1 << 10):g} KiB"


def _object(members: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(members) > MAX_MEMBERS:
        raise ValueError(f"an object has {len(members):,} members; at most {MAX_MEMBERS:,}")
    return dict(members)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")
