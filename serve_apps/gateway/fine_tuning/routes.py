"""The routes of fine-tuning, in OpenAI's form."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.routing import BaseRoute

from loray.catalog import Catalog
from loray.errors import NotFoundError, RequestError
from loray.schemas.openai.fine_tuning import (
    FineTuningCheckpointList,
    FineTuningEventList,
    FineTuningJob,
    FineTuningJobList,
    FineTuningRequest,
)
from loray.schemas.openai.responses import ResponseBody
from loray.spec import JobId
from serve_apps.auth import may, principal_of
from serve_apps.gateway.files.storage import FileStorage
from serve_apps.gateway.fine_tuning.jobs import FineTuning
from serve_apps.gateway.routes import ABOUT_OWN, JSON, WITH_FORM, Answers, parsed_body

_METADATA = re.compile(r"metadata\[(.{1,64})\]")

JobPath = Annotated[JobId, Path(description="`id` of a job")]
After = Annotated[str | None, Query(max_length=192, description="only what follows the item of this id")]
Limit = Annotated[int, Query(ge=1, le=100)]


def fine_tuning_routes(storage: FileStorage, jobs: FineTuning) -> list[BaseRoute]:
    """Make the routes of one gateway."""
    router = APIRouter()

    async def answer(request: Request, question: Callable[[Catalog], ResponseBody]) -> Response:
        principal = principal_of(request)
        storage.count(principal)
        found = await jobs.run(principal.tenant, lambda: question(storage.catalog_of(principal)))
        return Response(found.to_json(), media_type=JSON)

    @router.post("/v1/fine_tuning/jobs", response_class=JSONResponse)
    @may("train")
    @Answers(WITH_FORM, {JSON: FineTuningJob}, FineTuningRequest)
    async def create_fine_tuning_job(request: Request) -> Response:
        """Train an adapter with uploaded files, and publish it as the next version of `suffix`."""
        asked = await parsed_body(request, FineTuningRequest)
        return await answer(request, lambda catalog: jobs.create(catalog, storage.store, asked))

    @router.get("/v1/fine_tuning/jobs", response_class=JSONResponse)
    @may("train")
    @Answers(ABOUT_OWN, {JSON: FineTuningJobList})
    async def list_fine_tuning_jobs(request: Request, after: After = None, limit: Limit = 20) -> Response:
        """Training jobs of the key's tenant, newest first; `metadata[KEY]=VALUE`: only those with it."""
        wanted = {}
        for name, value in request.query_params.multi_items():
            if (key := _METADATA.fullmatch(name)) is not None:
                wanted[key[1]] = value
            elif name == "metadata" and value != "null":
                raise RequestError("metadata is given by keys, as metadata[team]=sales", "metadata")
        return await answer(request, lambda catalog: jobs.page(catalog, after, limit, wanted))

    @router.get("/v1/fine_tuning/jobs/{id}", response_class=JSONResponse)
    @may("train")
    @Answers(ABOUT_OWN, {JSON: FineTuningJob})
    async def get_fine_tuning_job(request: Request, id: JobPath) -> Response:
        """One job; `fine_tuned_model` is the model to request once it has succeeded."""
        return await answer(request, lambda catalog: jobs.get(catalog, id))

    @router.post("/v1/fine_tuning/jobs/{id}/cancel", response_class=JSONResponse)
    @may("train")
    @Answers(ABOUT_OWN, {JSON: FineTuningJob})
    async def cancel_fine_tuning_job(request: Request, id: JobPath) -> Response:
        """Stop a job, which is `cancelled` once its driver has ended."""
        return await answer(request, lambda catalog: jobs.cancel(catalog, id))

    @router.get("/v1/fine_tuning/jobs/{id}/events", response_class=JSONResponse)
    @may("train")
    @Answers(ABOUT_OWN, {JSON: FineTuningEventList})
    async def list_fine_tuning_events(
        request: Request, id: JobPath, after: After = None, limit: Limit = 20
    ) -> Response:
        """What has happened in a job, newest first: messages, and losses by step."""
        return await answer(request, lambda catalog: jobs.events(catalog, id, after, limit))

    @router.get("/v1/fine_tuning/jobs/{id}/checkpoints", response_class=JSONResponse)
    @may("train")
    @Answers(ABOUT_OWN, {JSON: FineTuningCheckpointList})
    async def list_fine_tuning_checkpoints(
        request: Request, id: JobPath, after: After = None, limit: Limit = 10
    ) -> Response:
        """The version that a job has published: no other checkpoint can be requested by a model's name."""
        return await answer(request, lambda catalog: jobs.checkpoints(catalog, id, after, limit))

    @router.post("/v1/fine_tuning/jobs/{id}/pause", include_in_schema=False)
    @router.post("/v1/fine_tuning/jobs/{id}/resume", include_in_schema=False)
    @may("train")
    async def pause_fine_tuning_job(id: JobPath) -> Response:
        raise NotFoundError(
            "jobs are not paused: cancel this one; `loray train RECIPE --resume` goes on from its last checkpoint"
        )

    @router.get("/v1/fine_tuning/checkpoints/{checkpoint:path}/permissions", include_in_schema=False)
    @router.post("/v1/fine_tuning/checkpoints/{checkpoint:path}/permissions", include_in_schema=False)
    @router.delete("/v1/fine_tuning/checkpoints/{checkpoint:path}/permissions/{id}", include_in_schema=False)
    @may("train")
    async def checkpoint_permissions(checkpoint: str) -> Response:
        raise NotFoundError("a version has no permissions of its own: `loray adapters share` says who sees the adapter")

    return router.routes
