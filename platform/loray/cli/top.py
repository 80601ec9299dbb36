"""`loray top`: what replicas, gateways and adapters do now."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import click
from rich.console import Group
from rich.live import Live

from loray.cli.connect import target, url_option
from loray.cli.output import console, emit, json_option, pairs, table
from loray.client import LorayClient
from loray.client.metrics import REQUESTS, TTFT, UNDER_WAY, Buckets, Metrics, percentile
from loray.errors import LorayError, PermissionDenied, Unauthenticated
from loray.schemas.status import ReplicaStatus, Status
from loray.spec import format_seconds

_TIMEOUT_S = 10.0
_WINDOW_S = 60.0
_ADAPTERS_SHOWN = 15


@dataclass(frozen=True, slots=True)
class StatusSample:
    """Status and metrics at a time, `at` (of a monotonic clock). Without metrics, the three mappings are empty."""

    at: float
    status: Status
    ttft: Mapping[str, Buckets] = field(default_factory=dict)  # by replica
    requests: Mapping[str, float] = field(default_factory=dict)  # by gateway
    under_way: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, status: Status, metrics: str | None) -> StatusSample:
        """`metrics`: Prometheus' text; None where the server gives none."""
        read = Metrics(metrics or "")
        ttft, requests = read.buckets(TTFT, "replica"), read.sums(REQUESTS, "gateway")
        return cls(time.monotonic(), status, ttft, requests, read.sums(UNDER_WAY, "gateway"))


def since(now: Buckets, earlier: Buckets | None) -> Buckets:
    """Subtracts what was counted before; all of it stays where nothing was counted since, or the counter began anew."""
    if not earlier:
        return now
    left = {bound: value - earlier.get(bound, 0.0) for bound, value in now.items()}
    return left if min(left.values(), default=0.0) >= 0 and max(left.values(), default=0.0) > 0 else now


def report(now: StatusSample, earlier: StatusSample | None) -> dict[str, Any]:
    """Makes what `loray top --json` prints: rates between both moments, percentiles of what ended between them."""
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
    """Lists the adapters that are in memory: in how many replicas' pools, and on how many hosts beside them."""
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


@click.command()
@click.option(
    "--interval", type=click.FloatRange(0.01), default=2.0, show_default=True, help="Seconds between two looks."
)
@click.option("--once", is_flag=True, help="Print one table after one interval, and end.")
@url_option
@json_option
def top(interval: float, once: bool, url: str | None, as_json: bool) -> None:
    """Show requests, tokens a second, times to the first token and memory of every replica, as they change.

    Rates and percentiles are of the last minute, of one interval with --once; percentiles are since a replica's start
    where no request began meanwhile. With --json, or where the output is no terminal, --once is meant.
    """
    out = console()
    with LorayClient(target(url), timeout=_TIMEOUT_S) as client:
        moments = deque([look(client)])
        if once or as_json or not out.is_terminal:
            time.sleep(interval)
            found = report(look(client), moments[0])
            if as_json:
                emit(found)
            else:
                out.print(shown(found))
            return
        with Live(shown(report(moments[0], None)), console=out, auto_refresh=False, screen=True) as live:
            while True:
                time.sleep(interval)
                try:
                    moments.append(look(client))
                except LorayError as e:
                    live.update(Group(str(e)), refresh=True)
                    continue
                while moments[-1].at - moments[0].at > _WINDOW_S and len(moments) > 2:
                    moments.popleft()
                live.update(shown(report(moments[-1], moments[0])), refresh=True)


def look(client: LorayClient) -> StatusSample:
    """Asks for status and metrics; there are no metrics where the key may not read them."""
    status = client.status()
    try:
        metrics: str | None = client.metrics()
    except (Unauthenticated, PermissionDenied):
        metrics = None
    return StatusSample.of(status, metrics)


def shown(found: dict[str, Any]) -> Group:
    """Shows a report as tables."""
    head = pairs([("base", found["base"]), ("state", found["status"]), ("adapters", found["adapters"])])
    columns = (
        "REPLICA",
        "RUNNING",
        "WAITING",
        "TOKENS/S",
        "TTFT P50",
        "TTFT P99",
        "POOL",
        "HIT RATE",
        "IN POOL",
        "ON HOST",
    )
    rows = [
        (
            r["replica"],
            r["running"],
            r["waiting"],
            _number(r["tokens_per_s"]),
            _ms(r["ttft_p50_s"]),
            _ms(r["ttft_p99_s"]),
            _share(r["pool_used"]),
            _share(r["hit_rate"]),
            r["adapters_in_pool"],
            r["adapters_on_host"],
        )
        for r in found["replicas"]
    ]
    parts: list[Any] = [head, table(columns, rows, right=columns[1:])]
    if found["gateways"]:
        names = ("GATEWAY", "UNDER WAY", "REQUESTS", "REQUESTS/S")
        lines: list[tuple[object, ...]] = [
            (g["gateway"], g["under_way"], f"{g['requests']:,}", _number(g["requests_per_s"]))
            for g in found["gateways"]
        ]
        parts.append(table(names, lines, right=names[1:]))
    if found["placements"]:
        most = found["placements"][:_ADAPTERS_SHOWN]
        lines = [(p["adapter"], p["pools"], p["hosts"]) for p in most]
        parts.append(table(("ADAPTER", "POOLS", "HOSTS"), lines, right=("POOLS", "HOSTS")))
        if len(found["placements"]) > len(most):
            parts.append(f"and {len(found['placements']) - len(most)} more adapters")
    return Group(*parts)


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else format_seconds(seconds)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.1f}"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"
