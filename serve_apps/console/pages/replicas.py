"""One replica: its figures, what its pool holds, how long its steps take, its adapters."""

from __future__ import annotations

import math
from itertools import islice
from typing import Annotated, Any, NamedTuple

from fastapi import Path, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from loray.api.status import ReplicaStatus
from loray.client.metrics import STEPS, Buckets, percentile
from loray.errors import ClusterError, NotFoundError, PermissionDenied
from loray.spec import format_seconds
from serve_apps.access import may
from serve_apps.console.backend import Console, ConsoleDep
from serve_apps.console.live.places import KINDS, parts_of, rows_of, strip_of
from serve_apps.console.routing import router_of

_ADAPTERS = 50
_HEIGHT = 120  # units of the picture

router = router_of("/serving/replicas")

ReplicaName = Annotated[str, Path(max_length=200)]


class Steps(NamedTuple):
    """How many steps took longer than the bound before, and at most `bound`; `height`: of the picture's bar."""

    bound: str
    num_steps: int
    height: float


@router.get("/{name}")
@may("observe")
async def show_replica(console: ConsoleDep, request: Request, name: ReplicaName) -> Response:
    return await _page(console, request, name, "replica.html")


@router.get("/{name}/live")
@may("observe")
async def show_live(console: ConsoleDep, request: Request, name: ReplicaName) -> Response:
    return await _page(console, request, name, "parts/replica.html")


async def _page(console: Console, request: Request, name: str, template: str) -> Response:
    """404 where no replica of this name answers: it has ended, or never was."""
    gateway = console.backend.gateway
    try:
        status = await gateway.status(request.state.authorization, layout=(name,))
        metrics = await gateway.metrics(request.state.authorization, STEPS)
    except (ClusterError, PermissionDenied) as e:
        return console.renderer.page(request, template, name=name, problem=str(e), replica=None)
    found = next((replica for replica in status.replicas if replica.replica == name), None)
    if found is None:
        raise NotFoundError(f"no replica {name!r} answers; it may have ended")
    buckets = metrics.buckets(STEPS, "replica").get(name, {})
    shown = await run_in_threadpool(_shown, found, buckets)
    return console.renderer.page(request, template, name=name, problem="", replica=found, **shown)


def _shown(replica: ReplicaStatus, buckets: Buckets) -> dict[str, Any]:
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
        "kinds": KINDS,
        "parts": parts_of(replica.blocks),
        "drawn": strip_of(replica.layout),
        "rows": rows_of(replica.layout),
        "steps": steps_of(buckets),
        "step_times": [percentile(buckets, share) for share in (0.5, 0.99)],
        "adapters": list(islice(held, _ADAPTERS)),
        "num_adapters": num_held,
        "height": _HEIGHT,
    }


def steps_of(buckets: Buckets) -> list[Steps]:
    """A bar for each bucket of the histogram, the highest of the picture's height; none before the first step."""
    bounds = sorted(buckets)
    counts = [buckets[bound] - (buckets[bounds[n - 1]] if n else 0) for n, bound in enumerate(bounds)]
    most = max(counts, default=0)
    if not most:
        return []
    texts = [f"≤ {format_seconds(bound)}" if math.isfinite(bound) else "longer" for bound in bounds]
    return [Steps(text, int(n), _HEIGHT * n / most) for text, n in zip(texts, counts, strict=True)]
