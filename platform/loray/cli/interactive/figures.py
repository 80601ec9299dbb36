"""Figures of a deployment at a moment, from /status and /metrics, and the rates since an earlier one."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from loray.api.status import ReplicaStatus, Status
from loray.client.metrics import REQUESTS, TTFT, UNDER_WAY, Buckets, Metrics, percentile


@dataclass(frozen=True, slots=True)
class Moment:
    """`at`: seconds of a monotonic clock. Without metrics, `ttft`, `requests` and `under_way` are empty."""

    at: float
    status: Status
    ttft: Mapping[str, Buckets] = field(default_factory=dict)  # by replica
    requests: Mapping[str, float] = field(default_factory=dict)  # by gateway
    under_way: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, status: Status, metrics: str | None) -> Moment:
        """`metrics`: Prometheus' text; None where the server gives none."""
        read = Metrics(metrics or "")
        ttft, requests = read.buckets(TTFT, "replica"), read.sums(REQUESTS, "gateway")
        return cls(time.monotonic(), status, ttft, requests, read.sums(UNDER_WAY, "gateway"))


def since(now: Buckets, earlier: Buckets | None) -> Buckets:
    """What was counted after `earlier`; all of it where nothing was counted in between, or the counter began anew."""
    if not earlier:
        return now
    left = {bound: value - earlier.get(bound, 0.0) for bound, value in now.items()}
    return left if min(left.values(), default=0.0) >= 0 and max(left.values(), default=0.0) > 0 else now


def report(now: Moment, earlier: Moment | None) -> dict[str, Any]:
    """What `loray top --json` prints: rates between both moments, percentiles of what ended between them."""
    seconds = 0.0 if earlier is None else now.at - earlier.at
    old = {} if earlier is None else {r.replica: r for r in earlier.status.replicas}
    replicas = []
    for r in now.status.replicas:
        buckets = since(now.ttft.get(r.replica, {}), None if earlier is None else earlier.ttft.get(r.replica))
        replicas.append(
            {
                "replica": r.replica,
                "base": r.base,
                "running": r.num_running,
                "waiting": r.num_waiting,
                "tokens_per_s": _rate(r, old.get(r.replica), seconds),
                "ttft_p50_s": percentile(buckets, 0.5),
                "ttft_p99_s": percentile(buckets, 0.99),
                "pool_used": _used(r),
                "hit_rate": r.hit_rate,
                "adapters_in_pool": len(r.adapters_in_pool),
                "adapters_on_host": len(r.adapters_on_host),
                "uptime_s": r.uptime_s,
            }
        )
    gateways = [
        {
            "gateway": name,
            "under_way": int(now.under_way.get(name, 0)),
            "requests": int(count),
            "requests_per_s": max(0.0, count - earlier.requests.get(name, 0.0)) / seconds
            if earlier is not None and seconds > 0
            else None,
        }
        for name, count in sorted(now.requests.items())
    ]
    return {
        "status": now.status.status,
        "base": now.status.base_names,
        "adapters": now.status.catalog.num_adapters,
        "replicas": replicas,
        "gateways": gateways,
        "placements": placements(now.status),
    }


def placements(status: Status) -> list[dict[str, Any]]:
    """The adapters that are in memory: in how many replicas' pools, and on how many hosts beside them."""
    pool: dict[str, int] = defaultdict(int)
    host: dict[str, int] = defaultdict(int)
    for r in status.replicas:
        for name in r.adapters_in_pool:
            pool[name] += 1
        for name in set(r.adapters_on_host) - set(r.adapters_in_pool):
            host[name] += 1
    names = sorted(pool.keys() | host.keys(), key=lambda name: (-pool[name], -host[name], name))
    return [{"adapter": name, "pools": pool[name], "hosts": host[name]} for name in names]


def _rate(now: ReplicaStatus, earlier: ReplicaStatus | None, seconds: float) -> float | None:
    if earlier is None or seconds <= 0 or now.num_output_tokens < earlier.num_output_tokens:
        return None
    return (now.num_output_tokens - earlier.num_output_tokens) / seconds


def _used(r: ReplicaStatus) -> float | None:
    blocks = sum(r.blocks.values())
    return 1 - r.blocks.get("free", 0) / blocks if blocks else None
