"""Routes about the server itself, and the models that it serves."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request
from fastapi.responses import JSONResponse, RedirectResponse, Response, StreamingResponse

from loray import __version__
from loray.api.status import Status
from serve_apps.access import may, principal_of
from serve_apps.deployment import CATALOG_PREFIX
from serve_apps.gateway.gateway import Gateway


def create_router(gateway: Gateway) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models", response_class=JSONResponse)
    @may("read")
    async def models(
        request: Request,
        after: Annotated[str | None, Query(description="only models after this one")] = None,
        limit: Annotated[int | None, Query(ge=1, description="at most as many models (and 10,000)")] = None,
    ) -> Response:
        """The base and the adapters that the caller sees, in pages; 60 a minute for a key."""
        principal = principal_of(request)
        gateway.models.count_list(principal)
        return StreamingResponse(gateway.models.page(principal, after, limit), media_type="application/json")

    @router.get("/v1/models/{model:path}")
    @may("read")
    async def model(request: Request, model: str) -> Response:
        """One model, by `name`, `name@alias` or `name@version`."""
        card = await gateway.models.card(model, principal_of(request))
        return Response(card.to_json(), media_type="application/json")

    @router.get("/health")
    @router.get("/ping")
    @router.post("/ping")
    @may("open")
    async def health() -> Response:
        """200 if a replica of any base answers that its engine runs, or a base is asleep and the next request starts
        one.
        """
        return await gateway.health()

    @router.get("/console", include_in_schema=False)
    @may("open")
    async def console() -> Response:
        return RedirectResponse(f"{CATALOG_PREFIX}/console")

    @router.get("/version")
    @may("open")
    async def version() -> Response:
        """The server's version."""
        return JSONResponse({"version": __version__})

    @router.get("/status")
    @may("observe")
    async def status(
        layout: bool = False,
        replica: Annotated[list[str] | None, Query(description="layouts of these replicas alone")] = None,
    ) -> Status:
        """What is served: replicas, adapters in memory, queues, autoscaling, the catalog's snapshot.

        With `layout=true` each engine also says what its pool's blocks hold by position, after its current step.
        """
        return await gateway.status(frozenset(replica) if layout and replica else layout)

    @router.get("/metrics")
    @may("observe")
    async def metrics(request: Request) -> Response:
        """Metrics of all gateways and replicas, for Prometheus."""
        return await gateway.metrics(request.headers.get("accept", ""))

    return router
