"""Routes of training jobs: submit a recipe, read status and log, stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Annotated

from fastapi import Path, Query, Request, Response
from fastapi.responses import PlainTextResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

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

LONGEST_FOLLOWED_S = 3600.0

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
@may("follow")
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
@may("follow")
def get_job(services: ServicesDep, asking: Asking, id: JobPath) -> JobResource:
    """One job, as Ray knows it now."""
    return views.job(services.jobs_of(asking).get(id))


@router.get(
    "/jobs/{id}/logs",
    response_class=PlainTextResponse,
    responses=responses(404, 410, 429) | {200: {"description": "What the driver and its workers wrote"}},
)
@may("follow")
async def get_logs(
    services: ServicesDep,
    request: Request,
    asking: Asking,
    id: JobPath,
    follow: Annotated[bool, Query(description="go on until the job ends")] = False,
    tail: Annotated[
        int | None, Query(ge=1, le=10_000, description="so many last lines, of which the last MiB; not with `follow`")
    ] = None,
) -> Response:
    """The job's log: one JSON object per event, between other lines. It is followed for an hour at most. 410: Ray does
    not have it any more. 429: the key, or its tenant, reads as many logs as it may.
    """
    jobs = services.jobs_of(asking)
    if tail is not None and not follow:
        return PlainTextResponse(await run_in_threadpool(jobs.tail, id, tail))
    held = AsyncExitStack()
    await held.enter_async_context(services.followers.one(asking.tenant, asking.account))
    try:
        if follow:
            return _Log(_for_an_hour(until_revoked(request, await run_in_threadpool(jobs.follow, id))), held)
        return _Log(await run_in_threadpool(jobs.logs, id), held)
    except BaseException:
        await held.aclose()
        raise


class _Log(StreamingResponse):
    """A log in pieces. `held` is closed at the end, also where the client leaves."""

    def __init__(self, pieces: AsyncIterator[str] | Iterator[str], held: AsyncExitStack) -> None:
        super().__init__(pieces, media_type="text/plain")
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._held.aclose()


async def _for_an_hour(pieces: AsyncIterator[str]) -> AsyncIterator[str]:
    ends_at = asyncio.get_running_loop().time() + LONGEST_FOLLOWED_S
    while True:
        try:
            async with asyncio.timeout_at(ends_at):
                piece = await anext(pieces)
        except StopAsyncIteration:
            return
        except TimeoutError:
            yield "… the log goes on; follow it again\n"
            return
        yield piece


@router.post("/jobs/{id}/stop", status_code=202, responses=responses(404) | examples.ok(examples.JOB, 202))
@may("train")
def stop_job(services: ServicesDep, asking: Asking, id: JobPath) -> JobResource:
    """Stop a job; it is shown as stopped once its driver has ended. One that has ended stays as it is."""
    return views.job(services.jobs_of(asking).stop(id))
