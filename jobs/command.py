"""`loray train`: submits a recipe to Ray, follows the job, and prints the published adapter's name."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from jobs.events.messages import describe
from jobs.events.terminal import RunView
from jobs.submission import commands
from loray.errors import ClusterError, LorayError
from loray.locations import http_url, is_this_machine
from loray.recipes.load import Recipe, load_recipe
from loray.settings import Settings
from loray.store import open_store
from loray.telemetry import get_logger

if TYPE_CHECKING:
    from jobs.submission.server import RayJobServer

log = get_logger(__name__)

_RECONNECTIONS = 5  # without a new line in between
_RECONNECT_S = 1.0


@click.command()
@click.argument("recipe")
@click.option("--address", help="Ray's job server, http://HOST:8265; without it a local cluster is used, or started.")
@click.option("--resume", is_flag=True, help="Go on with the latest run of this recipe, from its last checkpoint.")
@click.option("--json", "as_json", is_flag=True, help="Print the published adapter as JSON; progress goes to stderr.")
def train(recipe: str, address: str | None, resume: bool, as_json: bool) -> None:
    """Train the adapter of RECIPE (a YAML file, a shipped recipe's name, or a JSON object) and publish it."""
    console = Console(stderr=as_json)
    settings = Settings.from_env()
    loaded = load_recipe(recipe)
    address = address or settings.address
    server, job = _submit(loaded, settings, address, resume, console)
    view = RunView(console)
    try:
        with view:
            asyncio.run(_follow(server, job, view.feed))
    except KeyboardInterrupt:
        console.print(_how_to_go_on(recipe, server.address, job), highlight=False, soft_wrap=True)
        sys.exit(130)
    if view.published is None:
        _fail(view, server, job, console)
    elif as_json:
        click.echo(json.dumps(view.published | {"job_id": job}, indent=2))
    else:
        console.print(describe(view.published), style="green", highlight=False, soft_wrap=True)


def _submit(
    recipe: Recipe, settings: Settings, address: str | None, resume: bool, console: Console
) -> tuple[RayJobServer, str]:
    """Returns (server, job id). Without an address, the local cluster is used, and started if it does not run."""
    with tempfile.TemporaryDirectory() as stage:
        if address is not None and not is_this_machine(address):
            job = commands.remote(recipe, settings, address=address, resume=resume, stage=Path(stage))
        else:
            open_store(settings.store).check()  # refuses a store that the job could not publish to
            job = commands.local(recipe, settings, resume=resume)
        if address is None:
            from loray.local.cluster import ensure_started

            address = ensure_started(settings).address
        server = _connect(address)
        job_id = server.submit(job)
    console.print(f"training {recipe.spec.name} as job {job_id}", highlight=False)
    return server, job_id


def _connect(address: str) -> RayJobServer:
    from jobs.submission.server import RayJobServer  # late: importing Ray takes longer than the rest of the command

    server = RayJobServer(lambda: http_url(address))
    try:
        log.debug("Ray's job server is %s", server.address)
    except ClusterError as e:
        raise LorayError(f"no Ray job server answers at {address}; start the cluster, or give another --address") from e
    return server


async def _follow(server: RayJobServer, job: str, feed: Callable[[str], None]) -> None:
    """Calls `feed` once with every line of the job's log, until the job ends. A lost connection is opened again.

    LorayError after five connections in a row that bring no new line.
    """
    seen, failures = 0, 0
    while failures < _RECONNECTIONS:
        at, partial = 0, ""
        failures += 1
        try:
            async for chunk in server.follow(job):
                *lines, partial = (partial + chunk).split("\n")
                for line in lines:
                    at += 1
                    if at > seen:
                        feed(line)
                        seen, failures = at, 0
            if (known := server.find(job)) is not None and known.has_ended:
                if partial:
                    feed(partial)
                return
        except (ClusterError, RuntimeError, OSError) as e:
            log.debug("connection to the job server lost: %s", e)
        await asyncio.sleep(_RECONNECT_S)
    raise LorayError(f"lost the connection to the job server; job {job} may still be running: ray job status {job}")


def _how_to_go_on(recipe: str, address: str, job: str) -> str:
    token = os.environ.get("RAY_AUTH_TOKEN_PATH")  # the local cluster's
    ray = f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token} ray" if token else "ray"
    return (
        f"\nno longer following; training goes on as job {job}\n"
        f"  follow  {ray} job logs --address {address} --follow {job}\n"
        f"  stop    {ray} job stop --address {address} {job}\n"
        f"  resume  loray train {shlex.quote(recipe)} --resume   (once stopped, from the last checkpoint)"
    )


def _fail(view: RunView, server: RayJobServer, job: str, console: Console) -> None:
    if view.error is not None:
        console.print(describe(view.error), style="red", highlight=False, markup=False, soft_wrap=True)
    else:
        for line in view.log:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        known = server.find(job)
        ended = "and Ray has forgotten how" if known is None else f"as {known.status}"
        console.print(f"error: job {job} ended {ended} without a result", style="red")
    sys.exit(1)
