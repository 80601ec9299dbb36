"""The bytes of adapters, sent as archives and received as files, for pages and the REST API."""

from __future__ import annotations

from contextlib import AsyncExitStack
from functools import partial

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from loray.catalog import AdapterVersion
from loray.publishing.uploads import Archive, adapter_as_tar, check_file_name
from loray.schemas.resources import DownloadForm, FileResource
from loray.spec import Principal
from serve_apps.console.backend import Backend
from serve_apps.http import HeldResponse, length_of, receive_file

TAR, FILE = "application/x-tar", "application/octet-stream"


def archive_response(archive: Archive, held: AsyncExitStack, found: AdapterVersion, form: DownloadForm) -> HeldResponse:
    """Answer with the bytes of an archive."""
    suffix = {"peft": ".tar", "merged": "-merged.tar", "gguf": ".gguf"}[form]
    headers = {
        "Content-Disposition": f'attachment; filename="{label_of(found)}{suffix}"',
        "Content-Length": str(archive.num_bytes),
        "ETag": f'"{found.digest}"' if form == "peft" else f'"{found.digest}-{form}"',
    }
    return HeldResponse(archive.chunks, held, headers=headers, media_type=FILE if form == "gguf" else TAR)


async def send_adapter(backend: Backend, asking: Principal, found: AdapterVersion) -> HeldResponse:
    """Send the version's folder, read from the store meanwhile, in one of the tenant's places.

    Raises Overloaded where none is free, and as `adapter_as_tar`. A file that is damaged in the store ends the
    connection before the archive's end.
    """
    async with AsyncExitStack() as held:
        await held.enter_async_context(backend.downloads.one(asking.tenant))
        archive = await run_in_threadpool(adapter_as_tar, backend.store, found.digest, found.manifest, label_of(found))
        return archive_response(archive, held.pop_all(), found, "peft")


def label_of(version: AdapterVersion) -> str:
    """Name the archive's folder, and the file without its suffix."""
    return f"{version.name.replace('/', '-')}-{version.version}"


async def receive_upload(backend: Backend, request: Request, asking: Principal, id: str, name: str) -> FileResource:
    """Receive the file `name` of the upload `id`. All that it costs is counted before its first byte is read.

    Raises as `Uploads.put`; LimitExceeded where the tenant would store too much, Overloaded where no place or no disk
    is left.
    """
    service = backend.service_of(asking)
    num_bytes = length_of(request, check_file_name(name))
    async with backend.sending.one(asking.tenant):
        with backend.scratch.folder(num_bytes, of=asking.tenant) as folder:
            await run_in_threadpool(service.check_file, id, name, lambda: backend.scratch.held(asking.tenant))
            return await receive_file(request, folder / name, num_bytes, partial(service.put_file, id))
