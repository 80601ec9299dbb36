"""HTTP that the gateway and the catalog's API share: errors of routes, schemas of the OpenAPI document."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel
from pydantic.json_schema import JsonSchemaMode, models_json_schema
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from loray.api.uploads import DownloadForm
from loray.errors import LorayError
from loray.publishing.archive import Archive

CLIENT_LEFT = 499  # nginx's status for a client that has disconnected; only metrics show it
_REFERENCE = "#/components/schemas/{model}"


TAR, FILE = "application/x-tar", "application/octet-stream"


class ArchiveResponse(StreamingResponse):
    """The bytes of an archive. `held` is closed at the end, also where the client leaves."""

    def __init__(self, archive: Archive, held: ExitStack, label: str, form: DownloadForm, *, etag: str) -> None:
        suffix = {"peft": ".tar", "merged": "-merged.tar", "gguf": ".gguf"}[form]
        headers = {
            "Content-Disposition": f'attachment; filename="{label}{suffix}"',
            "Content-Length": str(archive.num_bytes),
            "ETag": f'"{etag}"',
        }
        super().__init__(archive.chunks, headers=headers, media_type=FILE if form == "gguf" else TAR)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._held.close()


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
        messages = {
            404: f"unknown URL: {request.method} {request.url.path}",
            405: f"{request.method} is not allowed for {request.url.path}",
        }
        response = refused(error.status_code, messages.get(error.status_code, str(error.detail)))
        response.headers.update(error.headers or {})
        return response


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
