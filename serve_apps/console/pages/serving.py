"""Serving: each replica's state, which adapters it holds, and why requests went where they went."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fastapi import Request
from fastapi.responses import Response

from loray.api.status import ReplicaStatus
from loray.errors import ClusterError, PermissionDenied
from serve_apps.console.backend import Console, ConsoleDep
from serve_apps.console.routing import router_of

_ROWS = 100


class Row(NamedTuple):
    """Where an adapter is: `tiers` has pool, host or nothing for each replica."""

    adapter: str
    tiers: tuple[str, ...]


router = router_of("/serving")


@router.get("")
async def show_serving(console: ConsoleDep, request: Request) -> Response:
    return await _page(console, request, "serving.html")


@router.get("/live")
async def show_live(console: ConsoleDep, request: Request) -> Response:
    return await _page(console, request, "parts/serving.html")


async def _page(console: Console, request: Request, template: str) -> Response:
    try:
        status = await console.backend.gateway.status(request.state.authorization)
        routed = await console.backend.gateway.routing(request.state.authorization)
    except (ClusterError, PermissionDenied) as e:
        return console.renderer.page(request, template, problem=str(e), status=None)
    rows = heat_map(status.replicas)
    return console.renderer.page(
        request,
        template,
        problem="",
        status=status,
        rows=rows[:_ROWS],
        num_rows=len(rows),
        routed=routed,
        num_routed=sum(routed.values()) or 1,
    )


def heat_map(replicas: Sequence[ReplicaStatus]) -> list[Row]:
    """Adapters by the number of replicas that hold them, the most first, then by name."""
    held = {name for replica in replicas for name in (*replica.adapters_in_pool, *replica.adapters_on_host)}
    rows = [Row(name, tuple(_tier(name, replica) for replica in replicas)) for name in held]
    return sorted(rows, key=lambda row: (-sum(map(bool, row.tiers)), row.adapter))


def _tier(name: str, replica: ReplicaStatus) -> str:
    if name in replica.adapters_in_pool:
        return "pool"
    return "host" if name in replica.adapters_on_host else ""
