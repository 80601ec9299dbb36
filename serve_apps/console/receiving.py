"""A file of an upload, from a request's body through this machine's disk into the store."""

from __future__ import annotations

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from loray.publishing.uploads import UploadedFile, Uploads, check_file_name
from loray.spec import Principal
from serve_apps.bodies import length_of, receive_file
from serve_apps.console.backend import Backend


async def receive_upload(backend: Backend, request: Request, asking: Principal, id: str, name: str) -> UploadedFile:
    """The file `name` of the upload `id`. All that it costs is counted before its first byte is read.

    Raises as `Uploads.put`; LimitExceeded where the tenant would store too much, Overloaded where no place or no disk
    is left.
    """
    num_bytes = length_of(request, check_file_name(name))
    async with backend.sending.one(asking.tenant):
        with backend.scratch.folder(num_bytes, of=asking.tenant) as folder:
            uploads = await run_in_threadpool(_room, backend, asking, id, name)
            return await receive_file(request, folder / name, num_bytes, lambda path: uploads.put(id, name, path))


def _room(backend: Backend, asking: Principal, id: str, name: str) -> Uploads:
    """The tenant's uploads, once it is known that its files under way may come."""
    catalog = backend.catalog_of(asking)
    uploads = Uploads(backend.store, catalog.own_tenant)
    uploads.check_open(id)
    catalog.check_stored_bytes(lambda: uploads.num_bytes(beside=(id, name)) + backend.scratch.held(asking.tenant))
    return uploads
