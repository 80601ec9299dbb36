"""HTTP that the gateway and the catalog's API share: errors of routes, schemas of the OpenAPI document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match, Route

from loray.errors import LorayError

CLIENT_LEFT = 499  # nginx's status for a client that has disconnected; only metrics show it
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
