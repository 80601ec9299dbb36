"""`loray train`: submits a run to Ray's job server or to a loray server, and follows it."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol, cast

import click
from rich.console import Console

from jobs.events import PublishedEvent, describe
from jobs.submission.commands import Place, Submission, Work, for_server
from jobs.submission.server import RayJob, RayJobServer, RayStatus
from jobs.view import ManyView, RunView
from loray.cli.plan import check_plan, check_plans, device_option
from loray.cli.recipes import RecipeSources, explained, recipe_options, several_recipes
from loray.client import CatalogClient
from loray.errors import ClusterError, JobNotFound, LorayError
from loray.local.serving import serving_urls
from loray.locations import http_url, is_this_machine
from loray.settings import Settings
from loray.spec import DEFAULT_ALIAS, TrainSpec
from loray.store import open_store
from loray.telemetry import get_logger

log = get_logger(__name__)

_RECONNECTIONS = 5  # without a new line in between
_RECONNECT_S = 1.0
_CONSOLE = "/api/v1/console"  # of a server


class ApiJobServer:
    """Offers what `loray train` needs of a job server, over the REST API. Raises the client's errors."""

    def __init__(self, url: str, client: CatalogClient | None = None) -> None:
        self._client = client or CatalogClient(url)

    def submit(self, spec: TrainSpec, *, resume: bool) -> str:
        return self._client.submit(spec, resume=resume).id

    def submit_many(self, name: str, specs: Sequence[TrainSpec], *, resume: bool) -> str:
        adapters = [spec.model_dump(mode="json") for spec in specs]
        return self._client.submit({"name": name, "adapters": adapters}, resume=resume).id

    def find(self, job_id: str) -> RayJob | None:
        try:
            job = self._client.job(job_id)
        except JobNotFound:
            return None
        return RayJob(cast(RayStatus, job.status.upper()), job.message)

    async def follow(self, job_id: str) -> AsyncIterator[str]:
        """Yields the log in whole lines, until the job ends. Blocks the event loop between them."""
        for line in self._client.follow(job_id):
            yield f"{line}\n"


@click.command()
@recipe_options
@several_recipes
@click.option(
    "--address",
    help="Ray's job server, http://HOST:8265; without it the server at LORAY_URL, or a local cluster that is started.",
)
@device_option("For the plan; on this machine without GPUs its memory is known.")
@click.option(
    "--no-plan",
    is_flag=True,
    help="Start even what the plan says cannot fit. A server at LORAY_URL still plans its jobs.",
)
@click.option("--explain", is_flag=True, help="Print the recipe with the reason of each value, and start nothing.")
@click.option(
    "--resume", is_flag=True, help="Go on with the latest unpublished run of this recipe, from its last checkpoint."
)
@click.option("--watch", "is_watched", is_flag=True, help="Open the run's page in the console of the server that runs.")
@click.option("--json", "as_json", is_flag=True, help="Print the published adapter as JSON; progress goes to stderr.")
def train(
    sources: RecipeSources,
    address: str | None,
    device_name: str | None,
    no_plan: bool,
    explain: bool,
    resume: bool,
    is_watched: bool,
    as_json: bool,
) -> None:
    """Train an adapter and publish it: that of RECIPE (a YAML file, a shipped recipe's name, or a JSON object), with
    the options on top of it, or that of the options alone. Fields that are left out have defaults for their method.

    Several recipes, one that lists `adapters`, or one with --each are one job, whose adapters share the base.
    """
    source, console = sources.source, Console(stderr=as_json)
    settings = Settings.from_env()
    address = address or settings.address
    if not sources.is_one:
        options = {"resume": resume, "no_plan": no_plan, "is_watched": is_watched, "as_json": as_json}
        if explain:
            for recipe in sources.load(settings.home)[1]:
                click.echo(f"--- # {recipe.spec.name}\n{explained(recipe.spec, settings.home)}", nl=False)
            return
        train_several(sources, settings, address, device_name, console, **options)
        return
    recipe = source.load(settings.home)
    if explain:
        click.echo(explained(recipe.spec, settings.home), nl=False)
        return
    if not no_plan:
        where = address or settings.url
        is_here = where is None or is_this_machine(where)
        check_plan(recipe.spec, settings.home, device_name=device_name, is_here=is_here, to=console)
    with console.status("starting the job"):  # and a local cluster, where none runs
        if address is None and settings.url is not None:
            api = ApiJobServer(settings.url)
            server: _Jobs = api
            job = api.submit(for_server(recipe, settings.url), resume=resume)
        else:
            server, job = submit(Work.training(recipe, resume=resume, no_plan=no_plan), settings, address)
    console.print(f"training {recipe.spec.name} as job {job}", highlight=False)

    def open_page() -> None:  # the catalog knows the job from its first event on
        _open_page(_console_url(settings, address), job, console)

    view = RunView(console, open_page) if is_watched else RunView(console)
    resumed = f"loray train {shlex.join(source.arguments)} --resume"
    published = watch(view, server, job, console, what="training", resumed=resumed)
    if as_json:
        click.echo(json.dumps(published | {"job_id": job}, indent=2))
    else:
        console.print(describe(published), style="green", highlight=False, soft_wrap=True)
        for line in what_next(published, _console_url(settings, address)):
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def train_several(
    sources: RecipeSources,
    settings: Settings,
    address: str | None,
    device_name: str | None,
    console: Console,
    *,
    resume: bool,
    no_plan: bool,
    is_watched: bool,
    as_json: bool,
) -> None:
    """Trains several adapters as one job, and shows each. Exits with 1 where one has failed."""
    name, recipes = sources.load(settings.home)
    where = address or settings.url
    if not no_plan:
        is_here = where is None or is_this_machine(where)
        check_plans(recipes, settings.home, device_name=device_name, is_here=is_here, to=console)
    with console.status("starting the job"):
        if address is None and settings.url is not None:
            api = ApiJobServer(settings.url)
            server: _Jobs = api
            job = api.submit_many(name, [for_server(recipe, where or "") for recipe in recipes], resume=resume)
        else:
            is_elsewhere = address is not None and not is_this_machine(address)
            work = Work.many(name, recipes, is_elsewhere=is_elsewhere, resume=resume, no_plan=no_plan)
            server, job = submit(work, settings, address)
    console.print(f"training {len(recipes)} adapters as job {job}", highlight=False)
    view = ManyView(console, partial(_open_page, _console_url(settings, address), job, console) if is_watched else None)
    again = f"loray train {shlex.join(sources.arguments)} --resume"
    show(view, server, job, console, what="training", resumed=again)
    if as_json:
        click.echo(json.dumps({"job_id": job, "adapters": view.outcomes}, indent=2))
    elif view.outcomes:
        console.print(view.table())
    if view.error is None and view.outcomes:
        return
    _print_end(view, server, job, console)
    if any(outcome["status"] == "failed" for outcome in view.outcomes):
        console.print(f"  go on with those that failed  {again}", highlight=False, markup=False, soft_wrap=True)
    sys.exit(1)


def what_next(published: PublishedEvent, console_url: str | None) -> list[str]:
    """Lists what a person may do with a version, with the commands. `console_url` None: no server runs."""
    label = published["label"]
    lines = [f"  ask it      loray chat {label}" + ("" if console_url else "   (once `loray serve` runs)")]
    if not published.get("refusal") and DEFAULT_ALIAS not in published["aliases"]:
        lines.append(f"  promote it  loray adapters promote {label}   (to {DEFAULT_ALIAS})")
    if console_url is not None:
        name = published["name"].rpartition("/")[2]
        lines.append(f"  look at it  {console_url}/adapters/{name}/versions/{published['version']}")
    return lines


def _console_url(settings: Settings, address: str | None) -> str | None:
    """Finds the console that shows the jobs of LORAY_URL, of the cluster at `address` or of this home; None where no
    server runs.
    """
    if address is None and settings.url is not None:
        urls = [settings.url]
    else:
        try:
            urls = serving_urls(replace(settings, address=address))
        except ClusterError as e:
            log.debug("no server is known: %s", e)
            urls = []
    return f"{urls[0].rstrip('/').removesuffix('/v1')}{_CONSOLE}" if urls else None


def _open_page(console_url: str | None, job: str, console: Console) -> None:
    """Opens the page of a job in a browser, or says how to come to one."""
    if console_url is None:
        told = f"no server runs whose console shows it; once `loray serve` runs, its page is {_CONSOLE}/jobs/{job}"
    else:
        told = page = f"{console_url}/jobs/{job}"
        if click.launch(page) != 0:
            told = f"no browser was found; open {page}"
    console.print(told, highlight=False, markup=False, soft_wrap=True)


class _Jobs(Protocol):
    """Declares what Ray's job server and a loray server both offer."""

    def find(self, job_id: str) -> RayJob | None: ...

    def follow(self, job_id: str) -> AsyncIterator[str]: ...


def submit(work: Work, settings: Settings, address: str | None) -> tuple[RayJobServer, str]:
    """Submits to Ray's job server at `address`; without one to that of the local cluster, which is started if it does
    not run. Returns (server, job id). Raises LorayError where nothing answers there.
    """
    with tempfile.TemporaryDirectory(prefix="loray-job-") as stage:
        place = Place.at(address, settings, Path(stage))
        if place.is_here:
            open_store(settings.store).check()  # refuses a store that the job could not publish to
        job = Submission.of(work, place)
        if address is None:
            from loray.local.cluster import ensure_started

            address = ensure_started(settings).address
        url = http_url(address)
        server = RayJobServer(lambda: url)
        try:
            log.debug("Ray's job server is %s", server.address)
        except ClusterError as e:
            raise LorayError(
                f"no Ray job server answers at {address}; start the cluster, or give another --address"
            ) from e
        return server, server.submit(job)


def _ways_back(server: _Jobs, job: str) -> tuple[str, str]:
    """Names the commands that follow and stop a job. Ray's own: a job that has not begun is not in the catalog."""
    if not isinstance(server, RayJobServer):
        return f"loray jobs logs {job} --follow", f"loray jobs stop {job}"
    token = os.environ.get("RAY_AUTH_TOKEN_PATH")  # the local cluster's
    ray = f"RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH={token} ray job" if token else "ray job"
    return f"{ray} logs --address {server.address} --follow {job}", f"{ray} stop --address {server.address} {job}"


def watch(view: RunView, server: _Jobs, job: str, console: Console, *, what: str, resumed: str) -> PublishedEvent:
    """Shows a job to its end, as `show`, and returns what it published. Exits with 1 where that is nothing."""
    show(view, server, job, console, what=what, resumed=resumed)
    if view.published is not None:
        return view.published
    _print_end(view, server, job, console)
    sys.exit(1)


def show(view: RunView | ManyView, server: _Jobs, job: str, console: Console, *, what: str, resumed: str) -> None:
    """Shows a job to its end.

    Ctrl-C ends the command and not the job; `resumed` is the command with which one that was stopped goes on.
    """
    try:
        with view:
            asyncio.run(follow(server, job, view.feed))
    except KeyboardInterrupt:
        follow_it, stop_it = _ways_back(server, job)
        console.print(
            f"\nno longer following; {what} goes on as job {job}\n"
            f"  follow  {follow_it}\n"
            f"  stop    {stop_it}\n"
            f"  resume  {resumed}   (once stopped, from the last checkpoint)",
            highlight=False,
            soft_wrap=True,
        )
        sys.exit(130)


def _print_end(view: RunView | ManyView, server: _Jobs, job: str, console: Console) -> None:
    """Prints why a job has no result."""
    if view.error is not None:
        console.print(describe(view.error), style="red", highlight=False, markup=False, soft_wrap=True)
    else:
        for line in view.log:
            console.print(line, markup=False, highlight=False, soft_wrap=True)
        known = server.find(job)
        ended = "and Ray has forgotten how" if known is None else f"as {known.status}"
        console.print(f"error: job {job} ended {ended} without a result", style="red")


async def follow(server: _Jobs, job: str, feed: Callable[[str], None]) -> None:
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
