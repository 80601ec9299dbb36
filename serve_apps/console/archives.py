"""The response with an adapter's archive, of the REST API and of the console."""

from __future__ import annotations

from contextlib import AsyncExitStack

from starlette.concurrency import run_in_threadpool
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from loray.api.uploads import DownloadForm
from loray.catalog import AdapterVersion
from loray.publishing.archive import Archive, adapter_as_tar
from loray.spec import Principal
from serve_apps.console.backend import Backend

TAR, FILE = "application/x-tar", "application/octet-stream"


class ArchiveResponse(StreamingResponse):
    """The bytes of an archive. `held` is closed at the end, also where the client leaves."""

    def __init__(self, archive: Archive, held: AsyncExitStack, found: AdapterVersion, form: DownloadForm) -> None:
        suffix = {"peft": ".tar", "merged": "-merged.tar", "gguf": ".gguf"}[form]
        headers = {
            "Content-Disposition": f'attachment; filename="{label_of(found)}{suffix}"',
            "Content-Length": str(archive.num_bytes),
            "ETag": f'"{found.digest}"' if form == "peft" else f'"{found.digest}-{form}"',
        }
        super().__init__(archive.chunks, headers=headers, media_type=FILE if form == "gguf" else TAR)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._held.aclose()


async def send_adapter(backend: Backend, asking: Principal, found: AdapterVersion) -> ArchiveResponse:
    """The version's folder, read from the store while it is sent. It has one of the tenant's places until its end.

    Raises Overloaded where none is free, and as `adapter_as_tar`. A file that is damaged in the store ends the
    connection before the archive's end.
    """
    async with AsyncExitStack() as held:
        await held.enter_async_context(backend.downloads.one(asking.tenant))
        archive = await run_in_threadpool(adapter_as_tar, backend.store, found.digest, found.manifest, label_of(found))
        return ArchiveResponse(archive, held.pop_all(), found, "peft")


def label_of(version: AdapterVersion) -> str:
    """The name of the archive's folder, and of the file without its suffix."""
    return f"{version.name.replace('/', '-')}-{version.version}"
