"""`loray top`: what replicas, gateways and adapters do now."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import click
from rich.console import Group
from rich.live import Live

from loray.cli.interactive.figures import Moment, report
from loray.cli.interactive.target import target, url_option
from loray.cli.output import console, emit, json_option, pairs, table
from loray.client import LorayClient
from loray.errors import LorayError, PermissionDenied, Unauthenticated
from loray.spec import format_seconds

_TIMEOUT_S = 10.0
_WINDOW_S = 60.0
_ADAPTERS_SHOWN = 15


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


def look(client: LorayClient) -> Moment:
    """Status and metrics. Without those where the key may not read them."""
    status = client.status()
    try:
        metrics: str | None = client.metrics()
    except (Unauthenticated, PermissionDenied):
        metrics = None
    return Moment.of(status, metrics)


def shown(found: dict[str, Any]) -> Group:
    """Tables of a report."""
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
