"""The pages of the tenant's files, sent from and to a browser, and of its batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, get_args
from urllib.parse import quote

from fastapi import Depends, HTTPException, Path, Query, Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from loray.catalog.files import MAX_BYTES, Purpose, check_purpose, purposes_of
from loray.errors import NotFoundError, RequestError
from loray.publishing.user_files import FileWriter, read_file
from serve_apps.auth import CurrentPrincipal, may
from serve_apps.console.archives import FILE
from serve_apps.console.backend import ConsoleDep, Service
from serve_apps.console.rendering import led_to, page_router
from serve_apps.http import length_of

_PAGE = 50

FilePath = Annotated[str, Path(max_length=64)]


async def _are_kept(console: ConsoleDep) -> None:
    if not console.backend.settings.files:
        raise NotFoundError("this deployment keeps no files: its operator has set LORAY_FILES=off")


router = page_router()
router.dependencies.append(Depends(_are_kept))


@router.get("/files")
@may("files")
def list_files(
    console: ConsoleDep,
    service: Service,
    request: Request,
    asking: CurrentPrincipal,
    purpose: Purpose | None = None,
    after: Annotated[str | None, Query(max_length=64)] = None,
) -> Response:
    """Files of the own tenant, newest first."""
    seen = purposes_of(asking)
    page = service.catalog.files.page(purposes=[p for p in seen if purpose in (None, p)], limit=_PAGE, after=after)
    return console.renderer.page(
        request,
        "files.html",
        files=page.files,
        more=page.files[-1].id if page.has_more else None,
        chosen=purpose,
        purposes=[p for p in get_args(Purpose) if p in seen],
        sent=[p for p in MAX_BYTES if p in seen],
    )


@router.put("/files")
@may("files")
async def receive_file(
    console: ConsoleDep,
    service: Service,
    request: Request,
    asking: CurrentPrincipal,
    filename: Annotated[str, Query(min_length=1, max_length=255)],
    purpose: Purpose,
) -> Response:
    """Keep the body as a file, as `POST /v1/files` does."""
    if purpose not in MAX_BYTES:
        raise RequestError("such files are made by batches", "purpose")
    check_purpose(asking, purpose)
    length_of(request, MAX_BYTES[purpose])
    backend = console.backend
    async with backend.sending.one(asking.tenant):
        with await run_in_threadpool(lambda: FileWriter(service.catalog, backend.store.objects)) as writer:
            async for chunk in request.stream():
                writer.take(chunk)
                if writer.num_bytes > MAX_BYTES[purpose]:
                    raise HTTPException(413, "the file is longer than its Content-Length")
                if writer.is_due:
                    await run_in_threadpool(writer.send)
            if not writer.num_bytes:
                raise RequestError("the file is empty", "file")
            name = "".join(char for char in filename if char.isprintable()) or "file"
            await run_in_threadpool(writer.finish, name, purpose)
    return led_to(request, "/files")


@router.get("/files/{id}/content")
@may("files")
def send_file(console: ConsoleDep, service: Service, id: FilePath) -> Response:
    file = service.catalog.files.get(id)
    service.catalog.audit.record("read_file", file.id, tenant=file.tenant)
    pieces: Iterator[bytes] = read_file(console.backend.store.objects, file)
    headers = {
        "Content-Length": str(file.bytes),
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
        "X-Content-Type-Options": "nosniff",
    }
    return StreamingResponse(pieces, headers=headers, media_type=FILE)


@router.post("/files/{id}/delete")
@may("files")
def delete_file(service: Service, request: Request, id: FilePath) -> Response:
    """Delete a file. A batch or a job that reads it goes on."""
    service.catalog.files.delete(id)
    return led_to(request, "/files")


# -- batches ----------------------------------------------------------------------------------------------------------

BatchPath = Annotated[str, Path(max_length=64)]


@router.get("/batches")
@may("batch")
def list_batches(
    console: ConsoleDep,
    service: Service,
    request: Request,
    after: Annotated[str | None, Query(max_length=64)] = None,
) -> Response:
    """Batches of the own tenant, newest first."""
    page = service.catalog.batches.page(limit=_PAGE, after=after)
    more = page.batches[-1].id if page.has_more else None
    return console.renderer.page(request, "batches.html", batches=page.batches, more=more)


@router.get("/batches/{id}/live")
@router.get("/batches/{id}")
@may("batch")
def show_batch(console: ConsoleDep, service: Service, request: Request, id: BatchPath) -> Response:
    return console.renderer.followed(request, "batch.html", batch=service.catalog.batches.get(id))


@router.post("/batches/{id}/cancel")
@may("batch")
def cancel_batch(service: Service, request: Request, id: BatchPath) -> Response:
    """Cancel a batch: what has an answer is in its files."""
    service.catalog.batches.cancel(id)
    return led_to(request, f"/batches/{id}")
