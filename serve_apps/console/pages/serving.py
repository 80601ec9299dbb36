"""Serving: each replica's state, which adapters it holds, and why requests went where they went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import Response

from loray.api.status import ReplicaStatus
from loray.errors import ClusterError, PermissionDenied
from serve_apps.console.backend import Backend
from serve_apps.console.rendering import PREFIX, Renderer

_ROWS = 100


class Row(NamedTuple):
    """Where an adapter is: `tiers` has pool, host or nothing for each replica."""

    adapter: str
    tiers: tuple[str, ...]


def create_router(backend: Backend, renderer: Renderer) -> APIRouter:
    router = APIRouter(prefix=f"{PREFIX}/serving", route_class=renderer.route_class())

    @router.get("")
    async def show_serving(request: Request) -> Response:
        return await _page(request, "serving.html")

    @router.get("/live")
    async def show_live(request: Request) -> Response:
        return await _page(request, "parts/serving.html")

    async def _page(request: Request, template: str) -> Response:
        try:
            status = await backend.gateway.status(request.state.authorization)
            routed = await backend.gateway.routing(request.state.authorization)
        except (ClusterError, PermissionDenied) as e:
            return renderer.page(request, template, problem=str(e), status=None)
        rows = heat_map(status.replicas)
        return renderer.page(
            request,
            template,
            problem="",
            status=status,
            rows=rows[:_ROWS],
            num_rows=len(rows),
            routed=routed,
            num_routed=sum(routed.values()) or 1,
        )

    return router


def heat_map(replicas: Sequence[ReplicaStatus]) -> list[Row]:
    """Adapters by the number of replicas that hold them, the most first, then by name."""
    held = {name for replica in replicas for name in (*replica.adapters_in_pool, *replica.adapters_on_host)}
    rows = [Row(name, tuple(_tier(name, replica) for replica in replicas)) for name in held]
    return sorted(rows, key=lambda row: (-sum(map(bool, row.tiers)), row.adapter))


def _tier(name: str, replica: ReplicaStatus) -> str:
    if name in replica.adapters_in_pool:
        return "pool"
    return "host" if name in replica.adapters_on_host else ""
