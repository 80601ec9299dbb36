"""HTTP that the gateway and the catalog's API share: errors of routes, requests' ids, schemas of OpenAPI documents."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from loray.errors import LorayError

CLIENT_LEFT = 499  # nginx's status for a client that has disconnected; only metrics show it
REQUEST_ID = "X-Request-Id"
_MAX_ID = 128  # characters
_REFERENCE = "#/components/schemas/{model}"


def install_error_handlers(
    app: FastAPI,
    *,
    failed: Callable[[Exception], Response],
    invalid: Callable[[RequestValidationError], LorayError],
    refused: Callable[[int, str], Response],
) -> None:
    """Turns every error of `app` into a response of its format.

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
            404: f"unknown URL: {request.method} {request.url.path}",
            405: f"{request.method} is not allowed for {request.url.path}",
        }
        response = refused(error.status_code, messages.get(error.status_code, str(error.detail)))
        response.headers.update(headers)
        return response


def _allowed(app: FastAPI, request: Request) -> str:
    """The methods of a path's routes, each of which has one."""
    at_path = (r for r in app.routes if isinstance(r, Route) and r.matches(request.scope)[0] is not Match.NONE)
    return ", ".join(sorted({method for route in at_path for method in route.methods or ()}))


def request_id_of(headers: Mapping[str, str]) -> str | None:
    """None where the client gives none, or one that is too long or not visible ASCII."""
    given = headers.get(REQUEST_ID, "")
    return given if 0 < len(given) <= _MAX_ID and all("!" <= char <= "~" for char in given) else None


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
    """ASGI middleware: the response has no id. Ray Serve gives each request one, and adds it to the response itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def without(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)[REQUEST_ID]
            await send(message)

        await self._app(scope, receive, without if scope["type"] == "http" else send)


def schema_reference(name: str) -> dict[str, str]:
    """Reference to a schema of the OpenAPI document."""
    return {"$ref": _REFERENCE.format(model=name)}


def extend_openapi(
    app: FastAPI,
    schemas: Sequence[tuple[type[BaseModel], JsonSchemaMode]],
    edit: Callable[[dict[str, Any]], None] = lambda document: None,
) -> None:
    """Adds `schemas` of models that no route declares to the app's OpenAPI document, then calls `edit` with it."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = generate()
            _, definitions = models_json_schema(schemas, ref_template=_REFERENCE)
            document.setdefault("components", {}).setdefault("schemas", {}).update(definitions["$defs"])
            edit(document)
        return generate()

    app.openapi = openapi  # type: ignore[method-assign]
