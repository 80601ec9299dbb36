"""The routes of files, in OpenAI's form."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated, Literal, NamedTuple
from urllib.parse import quote

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import BaseRoute

from loray.catalog.files import MAX_BYTES, Purpose, UserFile, purposes_of
from loray.publishing.user_files import read_file
from loray.schemas.openai.files import LONGEST_EXPIRY_S, SHORTEST_EXPIRY_S, FileDeleted, FileList, FileObject
from serve_apps.auth import may, principal_of
from serve_apps.gateway.files.storage import FileStorage
from serve_apps.gateway.files.upload import receive
from serve_apps.gateway.routes import ABOUT_OWN, BINARY, JSON, WITH_FORM, Answers, GatewayRoute
from serve_apps.http import HeldResponse

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["purpose", "file"],
                    "properties": {
                        "purpose": {"enum": list(MAX_BYTES)},
                        "file": {"type": "string", "format": "binary"},
                        "expires_after[anchor]": {"const": "created_at"},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": SHORTEST_EXPIRY_S,
                            "maximum": LONGEST_EXPIRY_S,
                        },
                    },
                }
            }
        },
    }
}

FileId = Annotated[str, Path(max_length=64, description="`id` of a file")]


def file_routes(storage: FileStorage) -> list[BaseRoute]:
    """Make the routes of one gateway."""
    router = APIRouter(route_class=GatewayRoute)

    @router.post("/v1/files", openapi_extra=_FORM)
    @may("files")
    @Answers(WITH_FORM, {JSON: FileObject})
    async def create_file(request: Request) -> Response:
        """Keep a file for a batch (200 MiB) or for fine-tuning (512 MiB), for 30 days or as `expires_after` says."""
        return _json(_object(await receive(request, storage, principal_of(request))))

    @router.get("/v1/files", response_class=JSONResponse)
    @may("files")
    @Answers(ABOUT_OWN, {JSON: FileList})
    async def list_files(
        request: Request,
        purpose: Annotated[Purpose | None, Query(description="only files with it")] = None,
        limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
        order: Annotated[Literal["asc", "desc"], Query(description="by age; desc: the newest first")] = "desc",
        after: Annotated[str | None, Query(max_length=64, description="only files after this one")] = None,
    ) -> Response:
        """The files of the key's tenant, those of its scopes alone."""
        principal = principal_of(request)
        seen = [p for p in purposes_of(principal) if purpose in (None, p)]
        page = await storage.ask(
            principal,
            lambda catalog: catalog.files.page(purposes=seen, limit=limit, after=after, is_ascending=order == "asc"),
        )
        found = [_object(file) for file in page.files]
        first, last = (found[0].id, found[-1].id) if found else (None, None)
        return _json(FileList(data=found, has_more=page.has_more, first_id=first, last_id=last))

    @router.get("/v1/files/{file_id}", response_class=JSONResponse)
    @may("files")
    @Answers(ABOUT_OWN, {JSON: FileObject})
    async def get_file(request: Request, file_id: FileId) -> Response:
        """One file, without its bytes."""
        return _json(_object(await storage.ask(principal_of(request), lambda catalog: catalog.files.get(file_id))))

    @router.delete("/v1/files/{file_id}", response_class=JSONResponse)
    @may("files")
    @Answers(ABOUT_OWN, {JSON: FileDeleted})
    async def delete_file(request: Request, file_id: FileId) -> Response:
        """Delete a file. A batch that reads it goes on."""
        await storage.ask(principal_of(request), lambda catalog: catalog.files.delete(file_id))
        return _json(FileDeleted(id=file_id))

    @router.get("/v1/files/{file_id}/content", response_class=JSONResponse)
    @may("files")
    @Answers((416, *ABOUT_OWN), {BINARY: None})
    async def get_content(request: Request, file_id: FileId) -> Response:
        """The bytes of a file, or of a part of it (`Range: bytes=0-1023`)."""
        principal = principal_of(request)
        file = await storage.ask(principal, lambda catalog: catalog.files.get(file_id))
        part = _part(request.headers.get("range"), file.bytes)
        await storage.ask(principal, lambda catalog: catalog.audit.record("read_file", file.id, tenant=file.tenant))
        async with AsyncExitStack() as held:
            await held.enter_async_context(storage.downloads.one(principal.tenant))
            return _content(request, storage, file, part, held.pop_all())

    return router.routes


class _Part(NamedTuple):
    start: int
    stop: int
    is_whole: bool


def _part(header: str | None, num_bytes: int) -> _Part:
    """Return the part that a header asks for; one of several parts, or of another unit, asks for all. Answers 416."""
    match = None if header is None else _RANGE.fullmatch(header.strip())
    if match is None or match[1] == match[2] == "":
        return _Part(0, num_bytes, True)
    if match[1]:
        start, stop = int(match[1]), min(num_bytes, int(match[2]) + 1 if match[2] else num_bytes)
    else:
        start, stop = max(0, num_bytes - int(match[2])), num_bytes
    if start >= stop:
        raise HTTPException(416, f"the file has {num_bytes} bytes", {"Content-Range": f"bytes */{num_bytes}"})
    return _Part(start, stop, False)


def _content(request: Request, storage: FileStorage, file: UserFile, part: _Part, held: AsyncExitStack) -> HeldResponse:
    """Answer with the bytes of a file, until the key is revoked."""
    start, stop, is_whole = part

    async def pieces() -> AsyncIterator[bytes]:
        found = read_file(storage.store, file, start, stop)
        while not request.state.revoked.done():
            piece = await storage.run(lambda: next(found, None))
            if piece is None:
                return
            yield piece

    headers = {
        "Content-Length": str(stop - start),
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
        "Accept-Ranges": "bytes",
        "ETag": f'"{file.sha256}"',
        "X-Content-Type-Options": "nosniff",
    }
    if not is_whole:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{file.bytes}"
    return HeldResponse(pieces(), held, status=200 if is_whole else 206, headers=headers, media_type=BINARY)


def _object(file: UserFile) -> FileObject:
    return FileObject(
        id=file.id,
        bytes=file.bytes,
        created_at=int(file.created_at.timestamp()),
        expires_at=None if file.expires_at is None else int(file.expires_at.timestamp()),
        filename=file.filename,
        purpose=file.purpose,
    )


def _json(answer: FileObject | FileList | FileDeleted) -> Response:
    return Response(answer.to_json(), media_type=JSON)
