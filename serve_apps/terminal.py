"""The output of `loray up` and `loray status`."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from rich.markup import escape

from loray.api.status import BaseStatus, ReplicaStatus, ScalingDecision, Status
from loray.cli.output import console, emit, pairs, table
from loray.client import LorayClient
from loray.errors import LorayError, PermissionDenied, Unauthenticated
from loray.spec import FleetSpec, format_size
from serve_apps.deployment import State

_DECISIONS_SHOWN = 5
_TIMEOUT_S = 10.0


def welcome(url: str, fleet: FleetSpec, remark: str, hints: Sequence[tuple[str, str]]) -> None:
    """`hints`: what to do next, as (what to type, what it does)."""
    names, model = _models(url)
    bases = ", ".join(fleet.names)
    body = json.dumps(
        {"model": model or fleet.names[0], "messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 64}
    )
    out = console()
    out.print(f"[green]serving[/] {bases} at [bold]{url}/v1[/]{remark and f', {remark}'}")
    out.print(f"models: {escape(names)}")
    out.print(f"try\n  curl {url}/v1/chat/completions -H 'Content-Type: application/json' \\", soft_wrap=True)
    if model is None or os.environ.get("LORAY_API_KEY"):
        out.print('    -H "Authorization: Bearer $LORAY_API_KEY" \\', soft_wrap=True)
    out.print(f"    -d {shlex.quote(body)}", soft_wrap=True, markup=False)
    out.print("more")
    for typed, does in hints:
        out.print(f"  {typed:<14}  {does}")


def _models(url: str) -> tuple[str, str | None]:
    """The names of what is served, and one of them; a sentence and None where this needs a key."""
    try:
        with LorayClient(url) as client:
            models = client.models()
    except (Unauthenticated, PermissionDenied):
        return "those that your API key sees (set LORAY_API_KEY to be shown them here)", None
    names = ", ".join(m.id for m in models[:8]) + (f" and {len(models) - 8} more" if len(models) > 8 else "")
    return names, models[-1].id


class Answer(NamedTuple):
    report: Status | None
    problem: str | None


def ask(url: str) -> Answer:
    """GET /status of the server at `url`. `problem`: why there is no report."""
    with LorayClient(url, timeout=_TIMEOUT_S) as client:
        try:
            return Answer(client.status(), None)
        except LorayError as e:
            return Answer(None, str(e))


def show_server(url: str, *, as_json: bool, store: str | None = None) -> None:
    """The status of a server of which only the URL is known. Exits with 1 if it does not answer, or is not well."""
    report, problem = ask(url)
    if as_json:
        known = None if report is None else report.model_dump(mode="json")
        emit({"serving": report is not None, "url": url, "store": store, "message": problem or "", "gateway": known})
        return
    state = "does not answer" if report is None else "running" if report.status == "ok" else report.status
    show_status(url, state, report, problem, None, store)
    if report is None:
        sys.exit(1)


def show_status(
    url: str, state: State | str, report: Status | None, problem: str | None, dashboard: str | None, store: str | None
) -> None:
    """Exits with 1 if the report says that something is wrong. `dashboard`: None without Ray."""
    out = console()
    rows: list[tuple[str, object]] = [
        ("state", state),
        ("url", f"{url}/v1"),
        ("dashboard", dashboard),
        ("store", store),
    ]
    if report is not None:
        catalog = report.catalog
        rows += [(_of(report, b, "base"), _base_row(report, b)) for b in report.bases]
        rows += [("adapters", catalog.num_adapters), ("catalog", catalog.failure)]
        for b in report.bases:
            if (scaling := b.autoscaling) is not None:
                rows.append((_of(report, b, "autoscaling"), f"{scaling.target} wanted: {scaling.reason}"))
    message = state.reason if isinstance(state, State) else None
    out.print(pairs([*rows, ("message", message), ("problem", problem)]))
    if report is not None and report.replicas:
        columns = (
            "replica",
            "base",
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
        out.print(table(columns, [replica_row(r) for r in report.replicas], right=columns[2:10]))
    for b in () if report is None else report.bases:
        if b.autoscaling is not None and b.autoscaling.decisions:
            changes = b.autoscaling.decisions[-_DECISIONS_SHOWN:]
            head = (f"{b.base} scaled at", "from", "to", "because")
            out.print(table(head, [_change(d) for d in changes], right=("from", "to")))
    if report is not None and report.status != "ok":
        sys.exit(1)


def _of(report: Status, base: BaseStatus, what: str) -> str:
    """The name of a row about one base."""
    return what if len(report.bases) == 1 or what == "base" else f"{what} of {base.base}"


def _base_row(report: Status, b: BaseStatus) -> str:
    if len(report.bases) == 1:
        return b.base if b.status != "asleep" else f"{b.base}, asleep"
    replicas = "asleep" if b.status == "asleep" else f"{b.num_replicas} of {b.target} replicas"
    return f"{b.base}: {replicas}, adapters: {b.num_adapters}"


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
    return (r.replica, r.base, r.pid, up, *counts, names)
