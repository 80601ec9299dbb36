"""The routes of batches, in OpenAI's form. A control process works on them (`serve_apps.batches`)."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.routing import BaseRoute

from loray.catalog.batches import Batch
from loray.errors import RequestError
from loray.schemas.openai.files import (
    BatchErrors,
    BatchLineError,
    BatchList,
    BatchObject,
    BatchRequest,
    RequestCounts,
)
from serve_apps.auth import may, principal_of
from serve_apps.gateway.files.storage import FileStorage
from serve_apps.gateway.routes import ABOUT_OWN, JSON, WITH_FORM, Answers, parsed_body

BatchId = Annotated[str, Path(max_length=64, description="`id` of a batch")]


def batch_routes(storage: FileStorage, paths: Collection[str]) -> list[BaseRoute]:
    """Make the routes of one gateway. `paths`: of its routes, among which are the endpoints of batches."""
    router = APIRouter()

    @router.post("/v1/batches")
    @may("batch")
    @Answers(WITH_FORM, {JSON: BatchObject}, BatchRequest)
    async def create_batch(request: Request) -> Response:
        """Answer the requests in a file within 24 hours, behind those of people."""
        body = await parsed_body(request, BatchRequest)
        if body.endpoint not in paths:
            raise RequestError(f"this server has no {body.endpoint}", "endpoint")
        expiry = body.output_expires_after
        return _answer(
            await storage.ask(
                principal_of(request),
                lambda catalog: catalog.batches.create(
                    body.input_file_id,
                    body.endpoint,
                    metadata=body.metadata,
                    output_expires_after=None if expiry is None else expiry.seconds,
                ),
            )
        )

    @router.get("/v1/batches", response_class=JSONResponse)
    @may("batch")
    @Answers(ABOUT_OWN, {JSON: BatchList})
    async def list_batches(
        request: Request,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: Annotated[str | None, Query(max_length=64, description="only batches after this one")] = None,
    ) -> Response:
        """The batches of the key's tenant, newest first."""
        page = await storage.ask(principal_of(request), lambda catalog: catalog.batches.page(limit=limit, after=after))
        found = [_object(batch) for batch in page.batches]
        first, last = (found[0].id, found[-1].id) if found else (None, None)
        listed = BatchList(data=found, has_more=page.has_more, first_id=first, last_id=last)
        return Response(listed.to_json(), media_type=JSON)

    @router.get("/v1/batches/{batch_id}", response_class=JSONResponse)
    @may("batch")
    @Answers(ABOUT_OWN, {JSON: BatchObject})
    async def get_batch(request: Request, batch_id: BatchId) -> Response:
        """One batch: its state, its counts, and its files once it has ended."""
        return _answer(await storage.ask(principal_of(request), lambda catalog: catalog.batches.get(batch_id)))

    @router.post("/v1/batches/{batch_id}/cancel", response_class=JSONResponse)
    @may("batch")
    @Answers((409, *ABOUT_OWN), {JSON: BatchObject})
    async def cancel_batch(request: Request, batch_id: BatchId) -> Response:
        """Cancel a batch. What has been answered is in its files."""
        return _answer(await storage.ask(principal_of(request), lambda catalog: catalog.batches.cancel(batch_id)))

    return router.routes


def _object(batch: Batch) -> BatchObject:
    errors = [BatchLineError(**error._asdict()) for error in batch.errors]
    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        errors=BatchErrors(data=errors) if errors else None,
        input_file_id=batch.input_file_id,
        status=batch.state,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        created_at=int(batch.created_at.timestamp()),
        expires_at=int(batch.expires_at.timestamp()),
        request_counts=RequestCounts(total=batch.total, completed=batch.completed, failed=batch.failed),
        metadata=dict(batch.metadata) or None,
        in_progress_at=_seconds(batch.in_progress_at),
        finalizing_at=_seconds(batch.finalizing_at),
        completed_at=_seconds(batch.completed_at),
        failed_at=_seconds(batch.failed_at),
        expired_at=_seconds(batch.expired_at),
        cancelling_at=_seconds(batch.cancelling_at),
        cancelled_at=_seconds(batch.cancelled_at),
    )


def _seconds(time: datetime | None) -> int | None:
    return None if time is None else int(time.timestamp())


def _answer(batch: Batch) -> Response:
    return Response(_object(batch).to_json(), media_type=JSON)
