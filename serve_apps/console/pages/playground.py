"""The playground: one message to the base and to adapters, side by side, as the gateway answers it."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query, Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from serve_apps.access import Asking
from serve_apps.console.backend import ConsoleDep
from serve_apps.console.routing import router_of

_SUGGESTED = 50
_CHAT = "/v1/chat/completions"

router = router_of("/playground")


@router.get("")
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
async def chat(console: ConsoleDep, request: Request) -> Response:
    """A request of OpenAI's chat completions, sent on with the key of this session; the answer as it comes."""
    status, chunks = await console.backend.gateway.stream(_CHAT, await request.body(), request.state.authorization)
    return StreamingResponse(chunks, status, media_type="text/event-stream", headers={"Cache-Control": "no-store"})


@router.get("/models")
async def find_models(
    console: ConsoleDep, request: Request, asking: Asking, search: Annotated[str, Query(max_length=96)] = ""
) -> Response:
    """Adapters with this in their names, for the list of suggestions."""
    catalog = console.backend.catalog_of(asking)
    found = await run_in_threadpool(lambda: catalog.names(limit=_SUGGESTED, search=search or None))
    return console.renderer.page(request, "parts/models.html", names=[entry.name for entry in found])
