"""The gateway's ASGI application: its routes, and request bodies as JSON."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response

from loray import __version__
from loray.api.openai import ChatCompletionRequest, CompletionRequest
from loray.api.status import Status
from loray.errors import RequestError
from serve_apps.gateway import errors
from serve_apps.gateway.answers.headers import EchoRequestId, RequestHeaders
from serve_apps.gateway.gateway import Gateway
from serve_apps.gateway.metrics import CountRequests
from serve_apps.gateway.openapi import describe_bodies
from serve_apps.http import parse_json


def create_app(gateway: Gateway) -> FastAPI:
    """Creates the ASGI application, which follows the catalog while it runs."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await gateway.directory.refresh()
        watcher = asyncio.create_task(gateway.directory.watch())
        yield
        watcher.cancel()
        gateway.directory.close()

    app = FastAPI(title="loray", version=__version__, lifespan=lifespan)
    errors.install(app)
    app.add_middleware(EchoRequestId)
    app.add_middleware(CountRequests, metrics=gateway.counted)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await gateway.completions(await _json(request), RequestHeaders.of(request.headers))

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await gateway.chat_completions(await _json(request), RequestHeaders.of(request.headers))

    @app.get("/v1/models")
    async def models() -> Response:
        return Response(gateway.directory.models(gateway.limit).to_json(), media_type="application/json")

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        card = await gateway.directory.model(model, gateway.limit)
        return Response(card.to_json(), media_type="application/json")

    @app.get("/health")
    async def health() -> Response:
        return await gateway.health()

    @app.get("/status")
    async def status() -> Status:
        return await gateway.status()

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        return await gateway.metrics(request.headers.get("accept", ""))

    describe_bodies(app, {"/v1/completions": CompletionRequest, "/v1/chat/completions": ChatCompletionRequest})
    return app


async def _json(request: Request) -> Any:
    raw = await request.body()
    try:
        text = raw.decode(json.detect_encoding(raw))
        body = parse_json(text)
        if "\\ud" in text.lower():  # an unpaired surrogate is valid JSON, but not valid text
            json.dumps(body, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as e:
        raise RequestError(f"the request body is not valid JSON: {e}") from e
    return body
