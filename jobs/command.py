"""`loray train`: submit a recipe to Ray, follow it, and end with the published adapter's name."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shlex
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from jobs.events.messages import describe
from jobs.events.terminal import RunView
from jobs.submission import submission
from loray.errors import LorayError
from loray.locations import is_this_machine
from loray.recipes.load import Recipe, load_recipe
from loray.settings import Settings
from loray.store import open_store
from loray.telemetry import get_logger

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
    client, job = _submit(loaded, settings, address, resume, console)
    view = RunView(console)
    try:
        with view:
            asyncio.run(_follow(client, job, view.feed))
    except KeyboardInterrupt:
        console.print(_how_to_go_on(recipe, client.get_address(), job), highlight=False, soft_wrap=True)
        sys.exit(130)
    if view.published is None:
        _fail(view, client, job, console)
    elif as_json:
        click.echo(json.dumps(view.published | {"job_id": job}, indent=2))
    else:
        console.print(describe(view.published), style="green", highlight=False, soft_wrap=True)


def _submit(recipe: Recipe, settings: Settings, address: str | None, resume: bool, console: Console) -> tuple[Any, str]:
    """(client, job id). Starts the local cluster where no address is given."""
    with tempfile.TemporaryDirectory() as stage:
        if address is not None and not is_this_machine(address):
            job = submission.remote(recipe, settings, address=address, resume=resume, stage=Path(stage))
        else:
            open_store(settings.store).check()  # refuses a store that the job could not publish to
            job = submission.local(recipe, settings, resume=resume)
        if address is None:
            from loray.local.cluster import ensure_started

            address = ensure_started(settings).address
        client = _connect(address)
        job_id = client.submit_job(**job._asdict())
    console.print(f"training {recipe.spec.name} as job {job_id}", highlight=False)
    return client, job_id


def _connect(address: str) -> Any:
    from ray.job_submission import JobSubmissionClient  # late: importing Ray takes longer than the rest of the command

    try:
        client = JobSubmissionClient(address if "://" in address else f"http://{address}")
    except ConnectionError as e:
        raise LorayError(f"no Ray job server answers at {address}; start the cluster, or give another --address") from e
    logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # it announces every closed socket
    return client


async def _follow(client: Any, job: str, feed: Callable[[str], None]) -> None:
    """Every line of the job's log, once, until the job ends. A lost connection is taken up again."""
    seen, failures = 0, 0
    while failures < _RECONNECTIONS:
        at, partial = 0, ""
        failures += 1
        try:
            async for chunk in client.tail_job_logs(job):
                *lines, partial = (partial + chunk).split("\n")
                for line in lines:
                    at += 1
                    if at > seen:
                        feed(line)
                        seen, failures = at, 0
            if client.get_job_status(job).is_terminal():
                if partial:
                    feed(partial)
                return
        except (RuntimeError, OSError) as e:
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


def _fail(view: RunView, client: Any, job: str, console: Console) -> None:
    if view.error is not None:
        console.print(describe(view.error), style="red", highlight=False, markup=False, soft_wrap=True)
    else:
        for line in view.log:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        console.print(f"error: job {job} ended as {client.get_job_status(job).value} without a result", style="red")
    sys.exit(1)
