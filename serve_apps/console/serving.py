"""The pages of what is served: the overview, all replicas with their pools, one replica, and the playground."""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Annotated, Any, NamedTuple

from fastapi import Path, Query, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from loray.client.metrics import ROUTED, STEPS, TTFT, Buckets, Metrics, percentile, together
from loray.errors import ClusterError, LorayError, NotFoundError, PermissionDenied
from loray.schemas.status import ReplicaStatus, Status
from loray.service import CatalogService
from loray.spec import Principal, format_seconds
from serve_apps.auth import CurrentPrincipal, may
from serve_apps.console.backend import Backend, ConsoleDep, Service
from serve_apps.console.rendering import EVENT_STREAM, STREAM_HEADERS, is_allowed, page_router

_NUM_NEWEST = 8  # versions and jobs of the overview
_ROWS, _COLUMNS = 50, 50  # adapters and replicas of the table of places
_TIERS_OF_REPLICAS = (("host", "adapters_on_host"), ("loading", "adapters_loading"), ("pool", "adapters_in_pool"))
# What a pool's block holds.
_KINDS: Mapping[str, str] = {
    "kv": "KV cache of requests",
    "cached": "prefixes that no request holds",
    "layered": "rows of adapters in layers",
    "flat": "other rows of adapters",
    "run": "VeRA pairs",
    "free": "free",
}
_WHY: dict[str, str] = {
    "pool": "its pool has the adapter",
    "host": "its host memory has the adapter",
    "recent": "a request for the adapter went there a moment ago",
    "hash": "no replica has the adapter: the one that its name hashes to",
    "overflow": "a bound on load was reached, or no replica was free",
    "base": "for the base: the replica with the least load",
}
_ADAPTERS = 50  # of one replica
_HEIGHT = 120  # units of the picture of step times
_SUGGESTED = 50  # models of the playground
_CHAT = "/v1/chat/completions"
_LOOK_S = 3.0  # the first look at a deployment finds its replicas
# Where an adapter is, from the best place on.
_TIERS = {
    "pool": "in a replica's pool",
    "host": "in a replica's host memory",
    "loading": "on its way from the store",
}

ReplicaName = Annotated[str, Path(max_length=200)]

router = page_router()


@router.get("/live")
@router.get("")
@may("identify")
async def show_overview(console: ConsoleDep, service: Service, request: Request, asking: CurrentPrincipal) -> Response:
    served = await _served(console.backend, request.state.authorization)
    recent = await run_in_threadpool(_recent, service, asking)
    return console.renderer.followed(request, "overview.html", **served, **recent)


async def _served(backend: Backend, authorization: str | None) -> dict[str, Any]:
    """`problem` says why there is no status; whether the caller may see it, the gateway decides."""
    seen: dict[str, Any] = {"status": None, "problem": "", "is_hidden": False, "first_token": None}
    try:
        status = await backend.gateway.status(authorization)
        # Adapters in how many places of pools and of host memory, and all in the store.
        tiers = {
            "pool": sum(len(replica.adapters_in_pool) for replica in status.replicas),
            "host": sum(len(replica.adapters_on_host) for replica in status.replicas),
            "store": status.catalog.num_adapters,
        }
        seen |= {"status": status, "tiers": tiers, "target": sum(base.target for base in status.bases)}
        first = together((await backend.gateway.metrics(authorization, TTFT)).buckets(TTFT, "replica"))
        seen["first_token"] = {"p50": percentile(first, 0.5), "p99": percentile(first, 0.99)}
    except PermissionDenied as e:
        seen |= {"problem": str(e), "is_hidden": True}
    except ClusterError as e:
        seen["problem"] = str(e)
    return seen


def _recent(service: CatalogService, asking: Principal) -> dict[str, Any]:
    may_audit, may_follow = is_allowed(asking, "audit"), is_allowed(asking, "follow")
    newest = service.audit_page(_NUM_NEWEST, action="register").items if may_audit else ()
    jobs = service.catalog.jobs.page(limit=_NUM_NEWEST, status="running").items if may_follow else ()
    return {"newest": newest, "jobs": jobs}


@router.get("/serving/live")
@router.get("/serving")
@may("observe")
async def show_serving(console: ConsoleDep, request: Request) -> Response:
    gateway = console.backend.gateway
    try:
        status = await gateway.status(request.state.authorization)
        metrics = await gateway.metrics(request.state.authorization, ROUTED, STEPS)
    except (ClusterError, PermissionDenied) as e:
        return console.renderer.followed(request, "serving.html", problem=str(e), status=None)
    shown = await run_in_threadpool(_serving_context, status, metrics)
    return console.renderer.followed(request, "serving.html", problem="", status=status, **shown)


def _serving_context(status: Status, metrics: Metrics) -> dict[str, Any]:
    """Describe the first replicas, whatever their number; nothing grows with the number of adapters."""
    replicas = status.replicas[:_COLUMNS]
    rows, num_rows = places_of(replicas, _ROWS)
    steps, routed = metrics.buckets(STEPS, "replica"), metrics.sums(ROUTED, "reason")
    most = sorted(routed.items(), key=lambda item: -item[1])
    return {
        "shown": replicas,
        "rows": rows,
        "num_rows": num_rows,
        "kinds": _KINDS,
        "step_times": {
            replica.replica: [percentile(steps.get(replica.replica, {}), share) for share in (0.5, 0.99)]
            for replica in replicas
        },
        "routed": [(_WHY.get(reason, reason), int(count)) for reason, count in most if count],
        "num_routed": sum(routed.values()) or 1,
    }


class PlaceRow(NamedTuple):
    """`tiers`: pool, loading, host or nothing, for each replica."""

    adapter: str
    tiers: tuple[str, ...]


def places_of(replicas: Sequence[ReplicaStatus], num_rows: int) -> tuple[list[PlaceRow], int]:
    """Return the `num_rows` adapters that most replicas hold, then by name, and how many adapters are held at all."""
    tiers: dict[str, dict[int, str]] = {}
    for at, replica in enumerate(replicas):
        for tier, field in _TIERS_OF_REPLICAS:
            for name in getattr(replica, field):
                tiers.setdefault(name, {})[at] = tier
    most = heapq.nsmallest(num_rows, tiers.items(), key=lambda item: (-len(item[1]), item[0]))
    columns = range(len(replicas))
    return [PlaceRow(name, tuple(held.get(at, "") for at in columns)) for name, held in most], len(tiers)


@router.get("/serving/replicas/{name}/live")
@router.get("/serving/replicas/{name}")
@may("observe")
async def show_replica(console: ConsoleDep, request: Request, name: ReplicaName) -> Response:
    """Answer 404 where no replica of this name answers: it has ended, or never was."""
    gateway = console.backend.gateway
    try:
        status = await gateway.status(request.state.authorization)
        metrics = await gateway.metrics(request.state.authorization, STEPS)
    except (ClusterError, PermissionDenied) as e:
        return console.renderer.followed(request, "replica.html", name=name, problem=str(e), replica=None)
    found = next((replica for replica in status.replicas if replica.replica == name), None)
    if found is None:
        raise NotFoundError(f"no replica {name!r} answers; it may have ended")
    buckets = metrics.buckets(STEPS, "replica").get(name, {})
    shown = await run_in_threadpool(_replica_context, found, buckets)
    return console.renderer.followed(request, "replica.html", name=name, problem="", replica=found, **shown)


def _replica_context(replica: ReplicaStatus, buckets: Buckets) -> dict[str, Any]:
    held = (
        (name, tier)
        for tier, names in (
            ("loading", replica.adapters_loading),
            ("pool", replica.adapters_in_pool),
            ("host", replica.adapters_on_host),
        )
        for name in names
    )
    num_held = len(replica.adapters_loading) + len(replica.adapters_in_pool) + len(replica.adapters_on_host)
    return {
        "kinds": _KINDS,
        "num_blocks": sum(replica.blocks.values()) or 1,
        "steps": steps_of(buckets),
        "step_times": [percentile(buckets, share) for share in (0.5, 0.99)],
        "adapters": list(islice(held, _ADAPTERS)),
        "num_adapters": num_held,
        "height": _HEIGHT,
    }


class Steps(NamedTuple):
    """`num_steps` steps took longer than the bound before, and at most `bound`; `height`: of the picture's bar."""

    bound: str
    num_steps: int
    height: float


def steps_of(buckets: Buckets) -> list[Steps]:
    """Make a bar for each bucket of the histogram, the highest of the picture's height; none before the first step."""
    bounds = sorted(buckets)
    counts = [buckets[bound] - (buckets[bounds[n - 1]] if n else 0) for n, bound in enumerate(bounds)]
    most = max(counts, default=0)
    if not most:
        return []
    texts = [f"≤ {format_seconds(bound)}" if math.isfinite(bound) else "longer" for bound in bounds]
    return [Steps(text, int(n), _HEIGHT * n / most) for text, n in zip(texts, counts, strict=True)]


@router.get("/playground")
@may("infer")
def show_playground(
    console: ConsoleDep,
    service: Service,
    request: Request,
    model: Annotated[list[str], Query(max_length=4)] = [],  # noqa: B006 - copied
) -> Response:
    adapters = [adapter.name for adapter in service.adapter_page(_SUGGESTED).items]
    bases = list(service.catalog.bases.fingerprints())[:_SUGGESTED]
    return console.renderer.page(
        request,
        "playground.html",
        bases=bases,
        adapters=adapters,
        chosen=model or [*bases[:1], *adapters[:1]],
    )


@router.post("/playground/chat")
@may("infer")
async def chat(console: ConsoleDep, request: Request) -> Response:
    """Send a request of OpenAI's chat completions on with the key of this session, and the answer as it comes."""
    status, chunks = await console.backend.gateway.stream(_CHAT, await request.body(), request.state.authorization)
    return StreamingResponse(chunks, status, media_type=EVENT_STREAM, headers=STREAM_HEADERS)


@router.get("/playground/tier")
@may("infer")
async def find_tier(
    console: ConsoleDep, service: Service, model: Annotated[str, Query(max_length=300)] = ""
) -> Response:
    """Say where the model's adapter is now: the next request takes it from there."""
    try:
        ref = await run_in_threadpool(lambda: service.catalog.adapters.resolve(model))
    except LorayError:  # a base; or no model at all, which its answer will say
        return JSONResponse({"tier": ""})
    try:
        found = await asyncio.wait_for(console.backend.placements.adapters([ref.digest]), _LOOK_S)
    except (LorayError, TimeoutError):
        return JSONResponse({"tier": ""})
    tiers = {placement.tier for placement in found}
    return JSONResponse({"tier": next((said for tier, said in _TIERS.items() if tier in tiers), "in the store")})


@router.get("/playground/models")
@may("infer")
async def find_models(
    console: ConsoleDep, service: Service, request: Request, search: Annotated[str, Query(max_length=96)] = ""
) -> Response:
    """Find adapters with this in their names, for the list of suggestions."""
    found = await run_in_threadpool(service.adapter_page, _SUGGESTED, search=search or None)
    return console.renderer.page(request, "parts/models.html", names=[adapter.name for adapter in found.items])
