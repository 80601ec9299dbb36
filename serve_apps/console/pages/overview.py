"""The first page: what is served, how fast, why so many replicas, and what was published last."""

from __future__ import annotations

from typing import Any

from fastapi import Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from loray.api.status import Status
from loray.catalog.identity.audit import AuditEntry
from loray.client.metrics import TTFT, percentile, together
from loray.errors import ClusterError, PermissionDenied
from loray.spec import Principal
from serve_apps.access import Asking, may
from serve_apps.console.backend import Backend, ConsoleDep
from serve_apps.console.rendering import is_allowed
from serve_apps.console.routing import router_of

_NUM_NEWEST = 8

router = router_of("")


@router.get("")
@may("identify")
async def show_overview(console: ConsoleDep, request: Request, asking: Asking) -> Response:
    return console.renderer.page(request, "overview.html", **await _state(console.backend, request, asking))


@router.get("/live")
@may("identify")
async def show_live(console: ConsoleDep, request: Request, asking: Asking) -> Response:
    """The part of the page that is asked for again and again."""
    return console.renderer.page(request, "parts/live.html", **await _state(console.backend, request, asking))


async def _state(backend: Backend, request: Request, asking: Principal) -> dict[str, Any]:
    served = await _served(backend, request.state.authorization)
    recent = await run_in_threadpool(_recent, backend, asking)
    return served | recent


async def _served(backend: Backend, authorization: str | None) -> dict[str, Any]:
    """`problem` says why there is no status; whether the caller may see it, the gateway decides."""
    seen: dict[str, Any] = {"status": None, "problem": "", "is_hidden": False, "first_token": None, "pace": None}
    try:
        status = await backend.gateway.status(authorization)
        seen |= {"status": status, "tiers": _tiers(status), "target": _target(status)}
        first = together((await backend.gateway.metrics(authorization, TTFT)).buckets(TTFT, "replica"))
        seen["first_token"] = {"p50": percentile(first, 0.5), "p99": percentile(first, 0.99)}
        seen["pace"] = backend.gateway.demand.tokens_per_s()
    except PermissionDenied as e:
        seen |= {"problem": str(e), "is_hidden": True}
    except ClusterError as e:
        seen["problem"] = str(e)
    return seen


def _tiers(status: Status) -> dict[str, int]:
    """Adapters by where they are: in how many places of pools and of host memory, and all in the store."""
    return {
        "pool": sum(len(replica.adapters_in_pool) for replica in status.replicas),
        "host": sum(len(replica.adapters_on_host) for replica in status.replicas),
        "store": status.catalog.num_adapters,
    }


def _target(status: Status) -> int:
    return sum(base.target for base in status.bases)


def _recent(backend: Backend, asking: Principal) -> dict[str, Any]:
    catalog = backend.catalog_of(asking)
    newest: tuple[AuditEntry, ...] = ()
    if is_allowed(asking, "audit"):
        of = None if asking.is_admin else asking.tenant
        newest = catalog.audit(limit=_NUM_NEWEST, action="register", tenant=of).entries
    jobs = catalog.jobs(limit=_NUM_NEWEST, status="running").jobs if is_allowed(asking, "follow") else ()
    return {"newest": newest, "jobs": jobs}
