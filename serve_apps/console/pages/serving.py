"""Serving: each replica's state, which adapters it holds, and why requests went where they went."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import NamedTuple

from fastapi import Request
from fastapi.responses import Response

from loray.api.status import ReplicaStatus
from loray.errors import ClusterError, PermissionDenied
from serve_apps.console.backend import Console, ConsoleDep
from serve_apps.console.routing import router_of

_ROWS, _COLUMNS = 100, 32
_WHY: dict[str, str] = {
    "pool": "its pool has the adapter",
    "host": "its host memory has the adapter",
    "recent": "a request for the adapter went there a moment ago",
    "hash": "no replica has the adapter: the one that its name hashes to",
    "overflow": "a bound on load was reached, or no replica was free",
    "base": "for the base: the replica with the least load",
}


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
    shown = status.replicas[:_COLUMNS]
    rows, num_rows = heat_map(shown, _ROWS)
    return console.renderer.page(
        request,
        template,
        problem="",
        status=status,
        shown=shown,
        rows=rows,
        num_rows=num_rows,
        routed=[(_WHY.get(reason, reason), count) for reason, count in routed.items() if count],
        num_routed=sum(routed.values()) or 1,
    )


def heat_map(replicas: Sequence[ReplicaStatus], num_rows: int) -> tuple[list[Row], int]:
    """The `num_rows` adapters that most replicas hold, then by name, and how many adapters are held at all."""
    tiers: dict[str, dict[int, str]] = {}
    for at, replica in enumerate(replicas):
        for tier, names in (("host", replica.adapters_on_host), ("pool", replica.adapters_in_pool)):
            for name in names:
                tiers.setdefault(name, {})[at] = tier
    most = heapq.nsmallest(num_rows, tiers.items(), key=lambda item: (-len(item[1]), item[0]))
    columns = range(len(replicas))
    return [Row(name, tuple(held.get(at, "") for at in columns)) for name, held in most], len(tiers)
