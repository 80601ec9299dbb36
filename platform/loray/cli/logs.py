"""`loray logs`: the logs of what is served here, and of jobs."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TextIO, cast

import click

from loray.errors import ClusterError, NotFoundError
from loray.local.cluster import LocalCluster, current_cluster
from loray.local.serving import StandaloneServer, serve_details, standalone_servers
from loray.settings import Settings
from loray.spec import is_engine

PARTS = ("replica", "gateway", "controller", "cluster")
_IS_OF: Mapping[str, Callable[[str], bool]] = {"replica": is_engine, "gateway": lambda name: name == "gateway"}
_POLL_S = 0.2
# Lines that Ray writes into a worker's output for itself, to know whose output follows.
_MARKERS = (":job_id:", ":actor_name:", ":task_name:")


@click.command()
@click.argument("part", default="replica", metavar="[replica|gateway|controller|cluster|job]")
@click.argument("job", required=False)
@click.option("--follow", "-f", is_flag=True, help="Go on with what is written from now on.")
@click.option(
    "--lines", "-n", "num_lines", type=click.IntRange(0), default=100, show_default=True, help="Of each file."
)
@click.pass_context
def logs(context: click.Context, part: str, job: str | None, follow: bool, num_lines: int) -> None:
    """Print the logs of what is served from this LORAY_HOME.

    \b
    replica     the engines (default)
    gateway     the processes that speak HTTP
    controller  Ray Serve's controller
    cluster     Ray's own start, and why it did not come up
    job ID      a training job, as `loray jobs logs` does

    `loray serve` is one process: its log is the file that its output goes to.
    """
    if part == "job":
        if job is None:
            raise click.UsageError("give the job's id, as in `loray logs job ID`; `loray jobs ls` lists them")
        group = cast("click.Group", context.find_root().command).get_command(context, "jobs")
        command = group.get_command(context, "logs") if isinstance(group, click.Group) else None
        if command is None:
            raise ClusterError("`loray jobs` is not installed: pip install loray")
        context.invoke(command, job=job, follow=follow)
        return
    if part not in PARTS or job is not None:
        raise click.UsageError(f"no logs of {part!r}; there are {', '.join(PARTS)}, and `job ID`")
    files = _files(Settings.from_env(), part)
    lines = list(last_lines(files, num_lines))
    for line in chain(lines, following(files) if follow else ()):
        click.echo(line)


def _files(settings: Settings, part: str) -> list[Path]:
    """Finds the logs of a part. ClusterError where nothing runs here, NotFoundError where it has no file."""
    if settings.address is not None:
        raise ClusterError(f"the logs are on the machines of {settings.address}: `ray logs` there, or its dashboard")
    cluster = current_cluster(settings.home)
    if cluster is not None:
        found = [Path(cluster.log_file)] if part == "cluster" else ray_files(cluster, serve_details(cluster), part)
    elif part == "cluster":
        found = [settings.home / "logs" / "cluster.log"]
    elif servers := standalone_servers(settings.home):
        found = [output_of(server) for server in servers]
    else:
        raise ClusterError("nothing is being served from this LORAY_HOME; `loray logs cluster` shows how Ray ended")
    there = [file for file in found if file.is_file()]
    if not there:
        raise NotFoundError(f"the {part} has no log yet; `loray status` says whether it has started")
    return there


def ray_files(cluster: LocalCluster, details: dict[str, Any], part: str) -> list[Path]:
    """Lists the files of Serve's ServeInstanceDetails: the log of each process, and what it wrote to stderr."""
    folder = Path(cluster.temp_dir) / "session_latest" / "logs"
    if part == "controller":
        actors: Sequence[dict[str, Any]] = [details.get("controller_info") or {}]
    else:
        actors = [
            replica
            for application in details.get("applications", {}).values()
            for name, deployment in application.get("deployments", {}).items()
            if _IS_OF[part](name)
            for replica in deployment.get("replicas", ())
        ]
    files = []
    for actor in actors:
        if path := actor.get("log_file_path"):
            files.append(folder / path.lstrip("/"))
        if worker := actor.get("worker_id"):
            files += sorted(folder.glob(f"worker-{worker}-*.err"))
    return files


def output_of(server: StandaloneServer) -> Path:
    """Returns the file that its stderr goes to. NotFoundError for a terminal or a pipe."""
    try:
        target = os.readlink(f"/proc/{server.pid}/fd/2")
    except OSError as e:
        raise NotFoundError(
            f"the output of process {server.pid} cannot be seen ({e.strerror}); for a file: `loray serve 2> serve.log`"
        ) from e
    if not Path(target).is_file():
        raise NotFoundError(
            f"`loray serve` at {server.url} (process {server.pid}) writes to {target}; for a file: "
            "`loray serve 2> serve.log`"
        )
    return Path(target)


def last_lines(files: Sequence[Path], number: int) -> Iterator[str]:
    """Yields each file's end without Ray's own marks, under its name where there are several. No file is held whole."""
    for file in files:
        if len(files) > 1:
            yield f"==> {file.name}"
        with file.open(encoding="utf-8", errors="replace") as lines:
            yield from deque((line.rstrip("\n") for line in lines if not line.startswith(_MARKERS)), maxlen=number)


def following(files: Sequence[Path], poll_s: float = _POLL_S) -> Iterator[str]:
    """Yields lines that are written from now on, under the file's name where it changes. Ends with Ctrl-C alone."""
    handles = [(file, file.open(encoding="utf-8", errors="replace")) for file in files]
    for _, handle in handles:
        handle.seek(0, os.SEEK_END)  # here, not when the first line is asked for
    return _written(handles, poll_s)


def _written(handles: Sequence[tuple[Path, TextIO]], poll_s: float) -> Iterator[str]:
    partial: dict[Path, str] = {file: "" for file, _ in handles}
    last: Path | None = None
    try:
        while True:
            quiet = True
            for file, handle in handles:
                *written, partial[file] = (partial[file] + handle.read()).split("\n")
                lines = [line for line in written if not line.startswith(_MARKERS)]
                if lines and len(handles) > 1 and file != last:
                    yield f"==> {file.name}"
                last = file if lines else last
                quiet = quiet and not written
                yield from lines
            if quiet:
                time.sleep(poll_s)
    finally:
        for _, handle in handles:
            handle.close()
