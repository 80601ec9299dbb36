"""The playground: one message to the base and to adapters, side by side, as the gateway answers it."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from loray.errors import LorayError
from serve_apps.access import Asking, may
from serve_apps.console.backend import ConsoleDep
from serve_apps.console.live.streams import EVENT_STREAM, STREAM_HEADERS
from serve_apps.console.routing import router_of

_SUGGESTED = 50
_CHAT = "/v1/chat/completions"
_LOOK_S = 3.0  # the first look at a deployment finds its replicas
# Where an adapter is, from the best place on.
_TIERS = {
    "pool": "in a replica's pool",
    "host": "in a replica's host memory",
    "loading": "on its way from the store",
}

router = router_of("/playground")


@router.get("")
@may("infer")
def show_playground(
    console: ConsoleDep,
    request: Request,
    asking: Asking,
    model: Annotated[list[str], Query(max_length=4)] = [],  # noqa: B006 - copied
) -> Response:
    catalog = console.backend.catalog_of(asking)
    adapters = [entry.name for entry in catalog.names(limit=_SUGGESTED)]
    bases = list(catalog.bases())[:_SUGGESTED]
    return console.renderer.page(
        request,
        "playground.html",
        bases=bases,
        adapters=adapters,
        chosen=model or [*bases[:1], *adapters[:1]],
    )


@router.post("/chat")
@may("infer")
async def chat(console: ConsoleDep, request: Request) -> Response:
    """A request of OpenAI's chat completions, sent on with the key of this session; the answer as it comes."""
    status, chunks = await console.backend.gateway.stream(_CHAT, await request.body(), request.state.authorization)
    return StreamingResponse(chunks, status, media_type=EVENT_STREAM, headers=STREAM_HEADERS)


@router.get("/tier")
@may("infer")
async def find_tier(console: ConsoleDep, asking: Asking, model: Annotated[str, Query(max_length=300)] = "") -> Response:
    """Where the model's adapter is now: the next request takes it from there."""
    backend = console.backend
    try:
        ref = await run_in_threadpool(lambda: backend.catalog_of(asking).resolve(model))
    except LorayError:  # a base; or no model at all, which its answer will say
        return JSONResponse({"tier": ""})
    try:
        found = await asyncio.wait_for(backend.placements.adapters([ref.digest]), _LOOK_S)
    except (LorayError, TimeoutError):
        return JSONResponse({"tier": ""})
    tiers = {placement.tier for placement in found}
    return JSONResponse({"tier": next((said for tier, said in _TIERS.items() if tier in tiers), "in the store")})


@router.get("/models")
@may("infer")
async def find_models(
    console: ConsoleDep, request: Request, asking: Asking, search: Annotated[str, Query(max_length=96)] = ""
) -> Response:
    """Adapters with this in their names, for the list of suggestions."""
    catalog = console.backend.catalog_of(asking)
    found = await run_in_threadpool(lambda: catalog.names(limit=_SUGGESTED, search=search or None))
    return console.renderer.page(request, "parts/models.html", names=[entry.name for entry in found])
