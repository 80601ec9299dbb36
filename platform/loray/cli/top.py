"""`loray top`: what replicas, gateways and adapters do now."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import click
from rich.console import Group
from rich.live import Live
from rich.table import Table

from loray.cli.connect import target, url_option
from loray.cli.output import console, emit, json_option, pairs, table
from loray.client import LorayClient
from loray.client.metrics import REQUESTS, TTFT, UNDER_WAY, Buckets, Metrics, percentile
from loray.errors import LorayError, PermissionDenied, Unauthenticated
from loray.schemas.status import Status
from loray.spec import format_seconds

_TIMEOUT_S = 10.0
_WINDOW_S = 60.0
_ADAPTERS_SHOWN = 15


class StatusSample(NamedTuple):
    """Status and metrics at a time, `at` (of a monotonic clock). Without metrics, the three mappings are empty."""

    at: float
    status: Status
    ttft: Mapping[str, Buckets]  # by replica
    requests: Mapping[str, float]  # by gateway
    under_way: Mapping[str, float]

    @classmethod
    def take(cls, client: LorayClient) -> StatusSample:
        """Asks for status and metrics; there are no metrics where the key may not read them."""
        status = client.status()
        try:
            text = client.metrics()
        except (Unauthenticated, PermissionDenied):
            text = ""
        read = Metrics(text)
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

    def rate(count: float, before: float | None) -> float | None:
        return (count - before) / (now.at - earlier.at) if earlier and before is not None else None

    old = {r.replica: r for r in earlier.status.replicas} if earlier else {}
    replicas = []
    for r in now.status.replicas:
        ttft = since(now.ttft.get(r.replica, {}), earlier and earlier.ttft.get(r.replica))
        before = old[r.replica].num_output_tokens if r.replica in old else None
        has_restarted = before is not None and r.num_output_tokens < before
        blocks = sum(r.blocks.values())
        replicas.append(
            {
                "replica": r.replica,
                "base": r.base,
                "running": r.num_running,
                "waiting": r.num_waiting,
                "tokens_per_s": None if has_restarted else rate(r.num_output_tokens, before),
                "ttft_p50_s": percentile(ttft, 0.5),
                "ttft_p99_s": percentile(ttft, 0.99),
                "pool_used": 1 - r.blocks.get("free", 0) / blocks if blocks else None,
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
            "requests_per_s": rate(count, earlier and min(count, earlier.requests.get(name, 0.0))),
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
    pool = Counter(name for r in status.replicas for name in r.adapters_in_pool)
    host = Counter(name for r in status.replicas for name in set(r.adapters_on_host) - set(r.adapters_in_pool))
    names = sorted(pool.keys() | host.keys(), key=lambda name: (-pool[name], -host[name], name))
    return [{"adapter": name, "pools": pool[name], "hosts": host[name]} for name in names]


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
        moments = deque([StatusSample.take(client)])
        if once or as_json or not out.is_terminal:
            time.sleep(interval)
            found = report(StatusSample.take(client), moments[0])
            if as_json:
                emit(found)
            else:
                out.print(shown(found))
            return
        with Live(shown(report(moments[0], None)), console=out, auto_refresh=False, screen=True) as live:
            while True:
                time.sleep(interval)
                try:
                    moments.append(StatusSample.take(client))
                except LorayError as e:
                    live.update(Group(str(e)), refresh=True)
                    continue
                while moments[-1].at - moments[0].at > _WINDOW_S and len(moments) > 2:
                    moments.popleft()
                live.update(shown(report(moments[-1], moments[0])), refresh=True)


_Columns = Mapping[str, tuple[str, Callable[[Any], str]]]  # heading → name in the report, and how it is written
_REPLICAS: _Columns = {
    "REPLICA": ("replica", str),
    "RUNNING": ("running", str),
    "WAITING": ("waiting", str),
    "TOKENS/S": ("tokens_per_s", "{:,.1f}".format),
    "TTFT P50": ("ttft_p50_s", format_seconds),
    "TTFT P99": ("ttft_p99_s", format_seconds),
    "POOL": ("pool_used", "{:.0%}".format),
    "HIT RATE": ("hit_rate", "{:.0%}".format),
    "IN POOL": ("adapters_in_pool", str),
    "ON HOST": ("adapters_on_host", str),
}
_GATEWAYS: _Columns = {
    "GATEWAY": ("gateway", str),
    "UNDER WAY": ("under_way", str),
    "REQUESTS": ("requests", "{:,}".format),
    "REQUESTS/S": ("requests_per_s", "{:,.1f}".format),
}
_PLACEMENTS: _Columns = {"ADAPTER": ("adapter", str), "POOLS": ("pools", str), "HOSTS": ("hosts", str)}


def shown(found: dict[str, Any]) -> Group:
    """Shows a report as tables."""
    head = pairs([("base", found["base"]), ("state", found["status"]), ("adapters", found["adapters"])])
    parts: list[Any] = [head, _table(_REPLICAS, found["replicas"])]
    if found["gateways"]:
        parts.append(_table(_GATEWAYS, found["gateways"]))
    if found["placements"]:
        parts.append(_table(_PLACEMENTS, found["placements"][:_ADAPTERS_SHOWN]))
        if (more := len(found["placements"]) - _ADAPTERS_SHOWN) > 0:
            parts.append(f"and {more} more adapters")
    return Group(*parts)


def _table(columns: _Columns, rows: Sequence[Mapping[str, Any]]) -> Table:
    cells = [
        tuple(None if row[name] is None else written(row[name]) for name, written in columns.values()) for row in rows
    ]
    return table(tuple(columns), cells, right=tuple(columns)[1:])
