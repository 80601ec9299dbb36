"""The response with an adapter's archive, of the REST API and of the console."""

from __future__ import annotations

from contextlib import ExitStack

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from loray.api.uploads import DownloadForm
from loray.publishing.archive import Archive

TAR, FILE = "application/x-tar", "application/octet-stream"


class ArchiveResponse(StreamingResponse):
    """The bytes of an archive. `held` is closed at the end, also where the client leaves."""

    def __init__(self, archive: Archive, held: ExitStack, digest: str, label: str, form: DownloadForm) -> None:
        suffix = {"peft": ".tar", "merged": "-merged.tar", "gguf": ".gguf"}[form]
        headers = {
            "Content-Disposition": f'attachment; filename="{label}{suffix}"',
            "Content-Length": str(archive.num_bytes),
            "ETag": f'"{digest}"' if form == "peft" else f'"{digest}-{form}"',
        }
        super().__init__(archive.chunks, headers=headers, media_type=FILE if form == "gguf" else TAR)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._held.close()
