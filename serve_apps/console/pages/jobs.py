"""Training jobs: their list, and one with its losses, its log and its end."""

from __future__ import annotations

import json
from typing import Annotated, get_args

from fastapi import Path, Request
from fastapi.responses import Response

from jobs.events.messages import decode
from loray.errors import ClusterError, LogsGone
from loray.spec import JobId, JobStatus
from serve_apps.access import Asking
from serve_apps.console.backend import ConsoleDep
from serve_apps.console.recipes import recipe_text
from serve_apps.console.rendering import led_to
from serve_apps.console.routing import router_of

_PAGE = 50
_LOG_LINES = 200
_MOST_POINTS = 1000
JobPath = Annotated[JobId, Path()]

router = router_of("/jobs")


@router.get("")
def list_jobs(
    console: ConsoleDep, request: Request, asking: Asking, cursor: JobId | None = None, status: JobStatus | None = None
) -> Response:
    """Jobs of the own tenant, newest first."""
    page = console.backend.jobs_of(asking).page(_PAGE, cursor, status, None)
    return console.renderer.page(
        request, "jobs.html", jobs=page.jobs, more=page.next, chosen=status, statuses=get_args(JobStatus)
    )


@router.get("/{id}")
def show_job(console: ConsoleDep, request: Request, asking: Asking, id: JobPath) -> Response:
    jobs = console.backend.jobs_of(asking)
    job = jobs.get(id)
    log, problem = "", ""
    try:
        log = jobs.logs(job.id)
    except (LogsGone, ClusterError) as e:
        problem = str(e)
    return console.renderer.page(
        request,
        "job.html",
        job=job,
        log="\n".join(log.splitlines()[-_LOG_LINES:]),
        problem=problem,
        losses=losses_of(log),
        recipe=recipe_text(job.recipe, console.backend.settings.home),
    )


@router.post("/{id}/stop")
def stop_job(console: ConsoleDep, request: Request, asking: Asking, id: JobPath) -> Response:
    job = console.backend.jobs_of(asking).stop(id)
    return led_to(request, f"/jobs/{job.id}")


def losses_of(log: str) -> str:
    """JSON of [steps, losses, held-out losses] from a log's events, evenly thinned to what a picture needs."""
    training: dict[int, float | None] = {}
    held_out: dict[int, float | None] = {}
    for line in log.splitlines():
        event = decode(line)
        if event is None or not isinstance(step := event.get("step"), int):
            continue
        if isinstance(loss := event.get("loss"), float):
            training[step] = loss
        if isinstance(loss := event.get("eval_loss"), float):
            held_out[step] = loss
    steps = sorted(training.keys() | held_out.keys())
    thinned = [step for n, step in enumerate(steps) if step in held_out or n % (1 + len(steps) // _MOST_POINTS) == 0]
    return json.dumps([thinned, [training.get(s) for s in thinned], [held_out.get(s) for s in thinned]])
