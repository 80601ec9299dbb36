"""The commands that serve on Ray: `loray up`, `status` and `down`."""

from __future__ import annotations

import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import click
from rich.console import Console
from rich.markup import escape

from loray.bases.registry import get_bases
from loray.cli.output import console, emit, json_option, pairs, table
from loray.client import LorayClient
from loray.errors import ClusterError, ConflictError, LorayError, PermissionDenied, Unauthenticated
from loray.local.cluster import current_cluster, dead_cluster, ensure_started, stop_local_cluster
from loray.local.processes import check_port
from loray.local.s3 import describe_store, has_local_s3, move_to_local_s3, start_home_store, stop_home_store
from loray.local.serving import ServingAddress, standalone_servers
from loray.locations import http_url
from loray.schemas.status import BaseStatus, ReplicaStatus, ScalingDecision, Status
from loray.settings import Settings
from loray.spec import FleetSpec, format_size
from serve_apps.deployment import DRAIN_S, ApplicationState, ServeApi, serve_config
from serve_apps.options import cannot_listen, check_keys, read_spec, spec_options

_READY_TIMEOUT_S = 600.0 + 5 * DRAIN_S  # Serve updates a fifth of the replicas at a time
_SHUTDOWN_S = 10.0  # of Serve, beside the requests under way
_POLL_S = 0.5
_REPLY_TIMEOUT_S = 10.0
_DECISIONS_SHOWN = 5
_HINTS = (("loray status", "what runs, and which adapters are in memory"), ("loray down", "stop it"))


@click.command()
@spec_options
@click.option("--num-replicas", type=int, help="Copies of the engine (default 1).")
@click.option("--num-gateways", type=int, help="Processes that speak HTTP (default 1).")
@click.option(
    "--min-replicas",
    type=int,
    help="With --max-replicas: as few copies as demand allows (default 1; 0: none while nobody asks).",
)
@click.option("--max-replicas", type=int, help="As many copies as adapter demand needs, up to this number.")
@click.option("--wait/--no-wait", default=True, help="Wait until it answers (default).")
@json_option
def up(spec_file: Path | None, s3: bool, wait: bool, as_json: bool, **options: Any) -> None:
    """Serve a base model and all adapters published for it, or several bases from a --spec.

    Serving goes on when this command ends; again with other options, it is updated in place.
    """
    settings = Settings.from_env()
    screen = Console(stderr=True)
    fleet = read_spec(spec_file, options)
    check_keys(fleet.host, settings)
    if settings.address is None:
        get_bases(settings.home, fleet.names)
        if current_cluster(settings.home) is None:
            _check_port(fleet)
    settings = _with_store(settings, s3, screen)
    if settings.address is None:
        with screen.status("starting Ray on this machine"):
            address = ensure_started(settings).address
    else:
        address = http_url(settings.address)
        if settings.is_remote:
            settings.check_reachable_from(address)
    with screen.status("deploying"):
        api = ServeApi(address)
        fleet = _settle_port(fleet, api.http())
        api.deploy(serve_config(fleet, settings))
    host = fleet.host if settings.address is None else urlsplit(address).hostname or fleet.host
    url = ServingAddress(host, fleet.port).url
    if wait:
        _wait(api, screen)
    if as_json:
        emit({"url": url, "bases": list(fleet.names), "is_ready": wait})
    elif wait:
        welcome(url, fleet, "", _HINTS)
    else:
        click.echo(f"deploying at {url}; `loray status` says how far it is")


@click.command()
@click.option("--url", help="A server's URL, of `loray serve` or `loray up`, here or elsewhere.")
@json_option
def status(url: str | None, as_json: bool) -> None:
    """Show what is being served: replicas, adapters in memory, queues.

    Without --url: what `loray up` serves, and otherwise what `loray serve` serves from this LORAY_HOME.
    """
    settings = Settings.from_env()
    if url is not None:
        show_server(url.rstrip("/").removesuffix("/v1"), as_json=as_json)
        return
    api = _running(settings)
    state = None if api is None else api.state()
    if api is None or state is None:
        servers = [] if settings.address else standalone_servers(settings.home)
        for server in servers:
            show_server(server.url, as_json=as_json, store=settings.store)
        if not servers and as_json:
            emit({"serving": False, "store": settings.store})
        elif not servers:
            click.echo("nothing is being served; start it with `loray serve` or `loray up`")
            click.echo(f"store: {describe_store(settings)}")
        return
    http = api.http()
    assert http is not None
    url = http._replace(host=urlsplit(api.dashboard).hostname or http.host).url if settings.address else http.url
    report, problem = ask(url)
    if as_json:
        emit(
            {
                "serving": True,
                "url": url,
                "store": settings.store,
                "state": state.status,
                "message": state.message,
                "gateway": None if report is None else report.model_dump(mode="json"),
            }
        )
        return
    show_status(url, state, report, problem, api.dashboard, describe_store(settings))


@click.command()
@click.option("--keep-cluster", is_flag=True, help="Leave this machine's Ray cluster (and S3 server) running.")
def down(keep_cluster: bool) -> None:
    """Stop serving, and the local Ray cluster and S3 server unless a job needs them."""
    settings = Settings.from_env()
    api = _running(settings)
    if api is None:
        cleared = settings.address is None and not keep_cluster and _clear_dead(settings.home)
        stopped = settings.address is None and not keep_cluster and _stop_store(settings)
        if stopped:
            click.echo("stopped the local S3 server")
        elif not cleared and not standalone_servers(settings.home):
            click.echo("nothing is running")
        return
    with Console(stderr=True).status("stopping") as spinner:
        was_serving = api.http() is not None
        if was_serving:
            api.delete()
        busy = settings.address is None and api.has_running_jobs()
        stop = settings.address is None and not keep_cluster and not busy
        if was_serving and not stop:
            spinner.update("waiting for requests under way to end")
            _wait_until_stopped(api)
        if stop:
            stop_local_cluster(settings.home)
            _stop_store(settings)
    click.echo("stopped serving" if was_serving else "nothing was being served")
    if stop:
        click.echo("stopped the local Ray cluster")
    elif busy and not keep_cluster:
        click.echo("the local Ray cluster stays: a job is running on it (`loray down` again once it has ended)")


# -- up ---------------------------------------------------------------------------------------------------------------


def _with_store(settings: Settings, s3: bool, screen: Console) -> Settings:
    """Start the store. With `s3`, this home's S3 server becomes the store."""
    if not s3:
        with screen.status("starting the store"):
            return start_home_store(settings)
    if settings.address is None and not has_local_s3(settings):
        api = _running(settings)
        if api is not None and api.has_running_jobs():
            raise ConflictError(
                "a job is running that will publish to the store of now; `loray up --s3` once it has ended"
            )
    with screen.status("moving to a local S3 server"):
        return move_to_local_s3(settings)


def _check_port(fleet: FleetSpec) -> None:
    try:
        check_port(fleet.host, fleet.port)
    except OSError as e:
        raise cannot_listen(fleet.host, fleet.port, e, "loray up") from e


def _settle_port(fleet: FleetSpec, serving: ServingAddress | None) -> FleetSpec:
    """Serve cannot change its address while it runs: an update keeps it, and ConflictError refuses another one that
    the command line or the file names.
    """
    if serving is None:
        _check_port(fleet)
        return fleet
    moved = {"host": serving.host != fleet.host, "port": serving.port != fleet.port}
    for name in ("host", "port"):
        if name in fleet.fields_set and moved[name]:
            raise ConflictError(
                f"serving runs at {name} {getattr(serving, name)} and cannot move to {getattr(fleet, name)} meanwhile; "
                f"leave {name} out of the command line and the file, or `loray down` first"
            )
    return fleet.at(serving.host, serving.port)


def _wait(api: ServeApi, screen: Console) -> None:
    with screen.status("waiting for the engine") as spinner:
        for state in api.watch(_READY_TIMEOUT_S):
            spinner.update(escape(str(state)))
            if state.has_failed:
                raise ClusterError(f"serving did not come up: {state.reason}; `loray logs replica` shows more")


# -- status and down --------------------------------------------------------------------------------------------------


def _running(settings: Settings) -> ServeApi | None:
    """None if this home's cluster does not run."""
    if settings.address is not None:
        return ServeApi(settings.address)
    return None if current_cluster(settings.home) is None else ServeApi(ensure_started(settings).address)


def _clear_dead(home: Path) -> bool:
    """Remove what is left of a cluster that died, its processes included. Returns whether there was one."""
    dead = dead_cluster(home)
    if dead is not None:
        stop_local_cluster(home)
        click.echo(f"removed what was left of a Ray cluster that had died (process {dead.pid})")
    return dead is not None


def _stop_store(settings: Settings) -> bool:
    """Stop this home's S3 server, unless `loray serve` uses it, and name what goes on. Returns whether it stopped."""
    servers = standalone_servers(settings.home)
    for server in servers:
        click.echo(f"`loray serve` goes on at {server.url}, and its store with it; end it where it runs (Ctrl-C)")
    return not servers and stop_home_store(settings)


def _wait_until_stopped(api: ServeApi) -> None:
    """Wait until requests under way have ended. Serve's own deletion returns after half a minute in any case."""
    deadline = time.monotonic() + DRAIN_S + _SHUTDOWN_S
    while time.monotonic() < deadline:
        with suppress(ClusterError):  # Serve's controller may end during the call
            if api.http() is None:
                return
        time.sleep(_POLL_S)
    raise ClusterError("requests under way are still being waited for; `loray status` says how far it is")


# -- what they print -------------------------------------------------------------------------------------------------


def welcome(url: str, fleet: FleetSpec, remark: str, hints: Sequence[tuple[str, str]]) -> None:
    """Say what is served and how to ask it. `hints`: what to do next, as (what to type, what it does)."""
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
    """Return the names of what is served, and one of them; a sentence and None where this needs a key."""
    try:
        with LorayClient(url) as client:
            models = client.models()
    except (Unauthenticated, PermissionDenied):
        return "those that your API key sees (set LORAY_API_KEY to be shown them here)", None
    names = ", ".join(m.id for m in models[:8]) + (f" and {len(models) - 8} more" if len(models) > 8 else "")
    return names, models[-1].id


class ServerReply(NamedTuple):
    """`problem`: why there is no report."""

    report: Status | None
    problem: str | None


def ask(url: str) -> ServerReply:
    """Ask the server at `url` for its status."""
    with LorayClient(url, timeout=_REPLY_TIMEOUT_S) as client:
        try:
            return ServerReply(client.status(), None)
        except LorayError as e:
            return ServerReply(None, str(e))


def show_server(url: str, *, as_json: bool, store: str | None = None) -> None:
    """Show the status of a server of which only the URL is known. Exits with 1 if it does not answer or is not well."""
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
    url: str,
    state: ApplicationState | str,
    report: Status | None,
    problem: str | None,
    dashboard: str | None,
    store: str | None,
) -> None:
    """Show a status. Exits with 1 if the report says that something is wrong. `dashboard`: None without Ray."""
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
    message = state.reason if isinstance(state, ApplicationState) else None
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
    """Name a row about one base."""
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
