"""`loray jobs`: training jobs, of the catalog and this machine's cluster, or at the server of LORAY_URL."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import cast, get_args

import click

from jobs.events import decode, in_words
from jobs.submission.server import HomeJobServer
from jobs.submission.tracker import JobTracker
from loray.catalog import Catalog
from loray.cli.connect import open_remote
from loray.cli.output import console, emit, json_option, table, when
from loray.client import CatalogClient
from loray.schemas.resources import JobResource
from loray.settings import Settings
from loray.spec import JobStatus

_PAGE = 100


@click.group()
def jobs() -> None:
    """Training jobs: list them, read their logs, stop them.

    JOB is a job's id, or what `?id=` chose for it. With LORAY_URL these commands ask a server.
    """


@jobs.command("ls")
@click.option("--status", type=click.Choice(get_args(JobStatus)), help="Only jobs with this status.")
@click.option("--name", help="Only jobs that train this adapter.")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True)
@json_option
def ls(status: JobStatus | None, name: str | None, limit: int, as_json: bool) -> None:
    """List jobs, the newest first."""
    with _opened() as calls:
        found = list(islice(calls.jobs(status=status, name=name), limit + 1))
    if as_json:
        emit([job.model_dump(mode="json") for job in found[:limit]])
    elif not found:
        click.echo("no jobs; `loray train RECIPE` starts one")
    else:
        columns = ("JOB", "ADAPTER", "STATUS", "VERSION", "CREATED", "ENDED", "MESSAGE")
        rows = [
            (
                job.id,
                job.name,
                job.status,
                job.version,
                when(job.created_at),
                job.ended_at and when(job.ended_at),
                job.message.strip().partition("\n")[0],
            )
            for job in found[:limit]
        ]
        console().print(table(columns, rows, right=("VERSION",)))
        if len(found) > limit:
            click.echo(f"the newest {limit}; there are more (--limit)")


@jobs.command()
@click.argument("job")
@click.option("--follow", "-f", is_flag=True, help="Go on until the job ends.")
def logs(job: str, follow: bool) -> None:
    """Print what the driver of JOB and its workers wrote: events as JSON, and on a terminal in words."""
    is_terminal = console().is_terminal
    with _opened() as calls:
        for line in calls.follow(job) if follow else calls.logs(job).splitlines():
            event = decode(line) if is_terminal else None
            click.echo(line if event is None else in_words(event))


@jobs.command()
@click.argument("job")
@json_option
def stop(job: str, as_json: bool) -> None:
    """Ask JOB to stop. It is shown as stopped once its driver has ended; one that has ended stays as it is."""
    with _opened() as calls:
        asked = calls.stop(job)
    if as_json:
        emit(asked.model_dump(mode="json"))
    elif asked.has_ended:
        click.echo(f"{asked.id} has {asked.status}" if asked.status != "stopped" else f"{asked.id} is stopped")
    else:
        click.echo(f"{asked.id} is asked to stop; `loray jobs ls` shows when it has")


@contextmanager
def _opened() -> Iterator[CatalogClient | _Direct]:
    with open_remote() as client:
        if client is not None:
            yield client
            return
        settings = Settings.from_env()
        catalog = Catalog(settings.catalog)
        try:
            yield _Direct(catalog, settings)
        finally:
            catalog.close()


class _Direct:
    """Makes the calls on the catalog and on Ray's job server: the one of LORAY_ADDRESS, else this home's."""

    def __init__(self, catalog: Catalog, settings: Settings) -> None:
        self._tracker = JobTracker(lambda: catalog, HomeJobServer(settings), settings)

    def jobs(self, *, status: str | None = None, name: str | None = None) -> Iterator[JobResource]:
        cursor: str | None = None
        while True:
            page = self._tracker.page(_PAGE, cursor, cast("JobStatus | None", status), name)
            yield from page.items
            if (cursor := page.next) is None:
                return

    def logs(self, job_id: str) -> str:
        return "".join(self._tracker.logs(job_id))

    def follow(self, job_id: str) -> Iterator[str]:
        pieces, rest = self._tracker.follow(job_id), ""

        async def next_piece() -> str | None:
            return await anext(pieces, None)

        with asyncio.Runner() as runner:
            while (piece := runner.run(next_piece())) is not None:
                *lines, rest = (rest + piece).split("\n")
                yield from lines
        if rest:
            yield rest

    def stop(self, job_id: str) -> JobResource:
        return self._tracker.stop(job_id)
