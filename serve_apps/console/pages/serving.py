"""Serving: each replica's state, which adapters it holds, demand, and why requests went where they went."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from loray.api.status import Status
from loray.client.metrics import ROUTED, STEPS, Metrics, percentile
from loray.errors import ClusterError, PermissionDenied
from serve_apps.access import may
from serve_apps.console.backend import Console, ConsoleDep
from serve_apps.console.live.places import KINDS, heat_map, parts_of, strip_of
from serve_apps.console.routing import router_of

_ROWS, _COLUMNS = 50, 50
_MOMENTS = 20
_WHY: dict[str, str] = {
    "pool": "its pool has the adapter",
    "host": "its host memory has the adapter",
    "recent": "a request for the adapter went there a moment ago",
    "hash": "no replica has the adapter: the one that its name hashes to",
    "overflow": "a bound on load was reached, or no replica was free",
    "base": "for the base: the replica with the least load",
}

router = router_of("/serving")


@router.get("")
@may("observe")
async def show_serving(console: ConsoleDep, request: Request) -> Response:
    return await _page(console, request, "serving.html")


@router.get("/live")
@may("observe")
async def show_live(console: ConsoleDep, request: Request) -> Response:
    return await _page(console, request, "parts/serving.html")


async def _page(console: Console, request: Request, template: str) -> Response:
    gateway = console.backend.gateway
    # Of many, only the engines that are shown make a layout: the first ones of the last look.
    wanted = gateway.replicas[:_COLUMNS] if len(gateway.replicas) > _COLUMNS else True
    try:
        status = await gateway.status(request.state.authorization, layout=wanted)
        metrics = await gateway.metrics(request.state.authorization, ROUTED, STEPS)
    except (ClusterError, PermissionDenied) as e:
        return console.renderer.page(request, template, problem=str(e), status=None)
    shown = await run_in_threadpool(_shown, status, metrics)
    demand = {"curve": gateway.demand.curve(), "moments": gateway.demand.rows(_MOMENTS)}
    return console.renderer.page(request, template, problem="", status=status, **shown, **demand)


def _shown(status: Status, metrics: Metrics) -> dict[str, Any]:
    """Of the first replicas, whatever their number; nothing grows with the number of adapters."""
    replicas = status.replicas[:_COLUMNS]
    rows, num_rows = heat_map(replicas, _ROWS)
    steps, routed = metrics.buckets(STEPS, "replica"), metrics.sums(ROUTED, "reason")
    most = sorted(routed.items(), key=lambda item: -item[1])
    return {
        "shown": replicas,
        "rows": rows,
        "num_rows": num_rows,
        "kinds": KINDS,
        "parts": {replica.replica: parts_of(replica.blocks) for replica in replicas},
        "strips": {replica.replica: strip_of(replica.layout) for replica in replicas},
        "step_times": {
            replica.replica: [percentile(steps.get(replica.replica, {}), share) for share in (0.5, 0.99)]
            for replica in replicas
        },
        "routed": [(_WHY.get(reason, reason), int(count)) for reason, count in most if count],
        "num_routed": sum(routed.values()) or 1,
    }
