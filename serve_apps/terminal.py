"""The output of `loray up` and `loray status`."""

from __future__ import annotations

import json
import shlex
import sys
from datetime import datetime

from rich.markup import escape

from loray.api.status import ReplicaStatus, ScalingDecision, Status
from loray.cli.output import console, pairs, table
from loray.client import LorayClient
from loray.spec import ServeSpec, format_size
from serve_apps.deployment import State

_DECISIONS_SHOWN = 5


def welcome(url: str, spec: ServeSpec) -> None:
    with LorayClient(url) as client:
        models = client.models()
    body = json.dumps({"model": models[-1].id, "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 64})
    names = ", ".join(m.id for m in models[:8]) + (f" and {len(models) - 8} more" if len(models) > 8 else "")
    out = console()
    out.print(f"[green]serving[/] {spec.base} at [bold]{url}/v1[/]")
    out.print(f"models: {escape(names)}")
    out.print(f"try\n  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\", soft_wrap=True)
    out.print(f"    -d {shlex.quote(body)}", soft_wrap=True, markup=False)
    out.print("more\n  loray status    what runs, and which adapters are in memory\n  loray down      stop it")


def show_status(url: str, state: State, report: Status | None, problem: str | None, dashboard: str, store: str) -> None:
    out = console()
    rows: list[tuple[str, object]] = [
        ("state", state),
        ("url", f"{url}/v1"),
        ("dashboard", dashboard),
        ("store", store),
    ]
    if report is not None:
        catalog = report.catalog
        rows += [("base", report.model), ("adapters", catalog.num_adapters), ("catalog", catalog.failure)]
        if report.autoscaling is not None:
            rows.append(("autoscaling", f"{report.autoscaling.target} wanted: {report.autoscaling.reason}"))
    out.print(pairs([*rows, ("message", state.reason), ("problem", problem)]))
    if report is not None and report.replicas:
        columns = (
            "replica",
            "pid",
            "up",
            "running",
            "waiting",
            "pool used",
            "hit rate",
            "host",
            "output tokens",
            "adapters in pool",
        )
        out.print(table(columns, [replica_row(r) for r in report.replicas], right=columns[1:9]))
    if report is not None and report.autoscaling is not None and report.autoscaling.decisions:
        changes = report.autoscaling.decisions[-_DECISIONS_SHOWN:]
        out.print(table(("scaled at", "from", "to", "because"), [_change(d) for d in changes], right=("from", "to")))
    if report is not None and report.status != "ok":
        sys.exit(1)


def _change(d: ScalingDecision) -> tuple[object, ...]:
    at = datetime.fromtimestamp(d.time).astimezone().strftime("%Y-%m-%d %H:%M:%S")
    return (at, d.from_replicas, d.to_replicas, d.reason)


def replica_row(r: ReplicaStatus) -> tuple[object, ...]:
    blocks = sum(r.blocks.values())
    used = f"{1 - r.blocks.get('free', 0) / blocks:.0%}" if blocks else ""
    hit_rate = "" if r.hit_rate is None else f"{r.hit_rate:.0%}"
    names = ", ".join(r.adapters_in_pool[:6]) + (" …" if len(r.adapters_in_pool) > 6 else "")
    up, num_tokens = f"{r.uptime_s:,.0f} s", f"{r.num_output_tokens:,}"
    counts = (r.num_running, r.num_waiting, used, hit_rate, format_size(r.host_bytes), num_tokens)
    return (r.replica, r.pid, up, *counts, names)
