"""Routes of training jobs: submit a recipe, read status and log, stop."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query, Request, Response
from fastapi.responses import PlainTextResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool

from loray.api.resources import JobResource, Page
from loray.serving.access import check
from loray.spec import JobId, JobStatus, QualifiedName, TrainSpec
from serve_apps.access import may, until_revoked
from serve_apps.api import examples, views
from serve_apps.api.problems import responses
from serve_apps.api.recipes import JSON, YAML, RecipeBody
from serve_apps.api.routes import router_of
from serve_apps.api.services import Asking, Limit, ServicesDep
from serve_apps.http import schema_reference

router = router_of("jobs")

JobPath = Annotated[JobId, Path(description="Ray's submission id, or what `?id=` chose for it")]
ChosenId = Annotated[
    JobId | None,
    Query(max_length=111, description="begins its id, and names it in the own tenant; made up where left out"),
]

_RECIPE = {"schema": schema_reference(TrainSpec.__name__), "example": examples.RECIPE}
_BODY = {"requestBody": {"required": True, "content": dict.fromkeys((JSON[0], YAML[0]), _RECIPE)}}


@router.post(
    "/jobs",
    status_code=201,
    openapi_extra=_BODY,
    responses=responses(403, 409, 415) | examples.ok(examples.JOB, 201, location=True),
)
@may("train")
def submit_job(
    services: ServicesDep,
    request: Request,
    response: Response,
    asking: Asking,
    recipe: RecipeBody,
    id: ChosenId = None,
    resume: Annotated[bool, Query(description="go on with the latest run of this recipe")] = False,
) -> JobResource:
    """Train the adapter of a recipe and publish it. `data` names s3:// URLs, or absolute paths on the cluster."""
    if recipe.publish.aliases:
        check(asking, "promote")
    job = services.jobs_of(asking).submit(recipe, id, resume=resume)
    response.headers["Location"] = request.url_for("get_job", id=job.id).path
    return views.job(job)


@router.get("/jobs", responses=responses() | examples.page(examples.JOB, "train_5f1b"))
@may("train")
def list_jobs(
    services: ServicesDep,
    request: Request,
    response: Response,
    asking: Asking,
    limit: Limit = 100,
    cursor: Annotated[JobId | None, Query(description="`next` of the page before")] = None,
    status: Annotated[JobStatus | None, Query(description="only jobs with this status")] = None,
    name: Annotated[QualifiedName | None, Query(description="only jobs that train this adapter")] = None,
) -> Page[JobResource]:
    """Jobs of the own tenant, newest first."""
    page = services.jobs_of(asking).page(limit, cursor, status, name)
    return views.page(tuple(views.job(job) for job in page.jobs), page.next, request, response)


@router.get("/jobs/{id}", responses=responses(404) | examples.ok(examples.JOB))
@may("train")
def get_job(services: ServicesDep, asking: Asking, id: JobPath) -> JobResource:
    """One job, as Ray knows it now."""
    return views.job(services.jobs_of(asking).get(id))


@router.get(
    "/jobs/{id}/logs",
    response_class=PlainTextResponse,
    responses=responses(404, 410) | {200: {"description": "What the driver and its workers wrote"}},
)
@may("train")
async def get_logs(
    services: ServicesDep,
    request: Request,
    asking: Asking,
    id: JobPath,
    follow: Annotated[bool, Query(description="go on until the job ends")] = False,
) -> Response:
    """The job's log: one JSON object per event, between other lines. 410: Ray does not have it any more."""
    jobs = services.jobs_of(asking)
    if follow:
        lines = await run_in_threadpool(jobs.follow, id)
        return StreamingResponse(until_revoked(request, lines), media_type="text/plain")
    return PlainTextResponse(await run_in_threadpool(jobs.logs, id))


@router.post("/jobs/{id}/stop", status_code=202, responses=responses(404) | examples.ok(examples.JOB, 202))
@may("train")
def stop_job(services: ServicesDep, asking: Asking, id: JobPath) -> JobResource:
    """Stop a job; it is shown as stopped once its driver has ended. One that has ended stays as it is."""
    return views.job(services.jobs_of(asking).stop(id))
