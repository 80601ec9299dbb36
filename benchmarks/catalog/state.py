"""What a deployment of many replicas says of itself: the answers of /status and of /metrics."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import cycle, islice
from types import SimpleNamespace
from typing import Any, cast

from loray.engine.memory.layout import MOST_STRETCHES
from loray.engine.metrics import EngineStats
from loray.engine.request import TokenOutput
from loray.schemas.status import BaseStatus, CatalogStatus, ReplicaStatus, Status, total
from loray.spec import ServeSpec, Stretch
from loray.telemetry import METRICS, HistogramCounts
from serve_apps.exposition import counter, encode, labelled, merge
from serve_apps.replica.metrics import ReplicaMetrics

NUM_REPLICAS = 50
_HOLDS = ("kv", "cached", "layered", "flat", "run", "free")


def status_json(names: Sequence[str]) -> str:
    """Each replica's pool holds its part of the adapters, and its host the next one's; no stretch of a pool is like the
    one before.
    """
    parts = [tuple(f"{name}@1" for name in names[n::NUM_REPLICAS]) for n in range(NUM_REPLICAS)]
    layout = tuple(Stretch(holds, 5) for holds in islice(cycle(_HOLDS), MOST_STRETCHES))
    replicas = tuple(
        ReplicaStatus(
            replica=f"r{n}",
            node="n",
            pid=n,
            uptime_s=1,
            blocks={holds: sum(s.num_blocks for s in layout if s.holds == holds) for holds in _HOLDS},
            layout=layout,
            adapters_in_pool=part,
            adapters_on_host=parts[n - 1][:100],
        )
        for n, part in enumerate(parts)
    )
    return Status(
        status="ok",
        bases=(
            BaseStatus(
                base="smollm2",
                status="ok",
                num_replicas=len(replicas),
                target=len(replicas),
                num_adapters=len(names),
                spec=ServeSpec(base="smollm2"),
            ),
        ),
        catalog=CatalogStatus(num_adapters=len(names)),
        replicas=replicas,
        totals=total(replicas),
    ).model_dump_json()


def metrics_text() -> str:
    """All metrics of the replicas, after requests of every method and steps of every length, and routing's."""
    routed = counter("routing_decisions_total", {(why,): 10 for why in ("pool", "host", "recent", "hash", "base")})
    replicas = [_of_replica(f"r{n}") for n in range(NUM_REPLICAS)]
    return encode(merge([labelled([routed], gateway="g1"), *replicas]), "").body.decode()


def _of_replica(name: str) -> list[Any]:
    metrics = ReplicaMetrics()
    for method in ("base", "lora", "vera", "longlora"):
        adapter = None if method == "base" else SimpleNamespace(method=method)
        request = SimpleNamespace(adapter=adapter, output_ids=(), prompt_ids=(1,))
        times = metrics.arrived(cast("Any", request))
        for _ in range(2):
            metrics.stepped([(times, TokenOutput("r", 1))])
        metrics.ended(times, "stop")
    return metrics.families(_stats(), name)


def _stats() -> EngineStats:
    def counts(metric: str) -> HistogramCounts:
        bounds = METRICS[metric].buckets
        return HistogramCounts(bounds, tuple(range(1, len(bounds) + 2)), 1.0)

    return EngineStats(
        blocks={"free": 100, "kv": 900},
        num_steps=100,
        adapters_in_pool=(),
        adapters_on_host=(),
        adapters_loading=(),
        prefix_cache_queries=1,
        prefix_cache_hits=1,
        step_seconds=counts("engine_step_seconds"),
        step_tokens=counts("engine_step_tokens"),
        step_adapters=counts("engine_step_adapters"),
        load_seconds=counts("adapter_load_seconds"),
        queue_seconds={"base": counts("request_queue_time_seconds")},
    )
