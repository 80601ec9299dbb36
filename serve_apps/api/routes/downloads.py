"""The route of downloads: a version as the folder that PEFT loads, merged into its base, or as GGUF.

Nothing is in memory as a whole: PEFT's files are sent while they are read from the store, and what is computed goes to
a folder of this machine first.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from loray.api.resources import VersionNumber
from loray.api.uploads import DownloadForm, DownloadResource, PresignedFileResource
from loray.catalog import AdapterVersion
from loray.publishing.archive import as_it_is, as_tar
from serve_apps.access import may
from serve_apps.api import examples
from serve_apps.api.problems import responses
from serve_apps.api.routes import router_of
from serve_apps.api.services import AdapterName, Asking, Services, ServicesDep
from serve_apps.console.archives import FILE, TAR, ArchiveResponse, label_of, send_adapter
from serve_apps.http import schema_reference

router = router_of("downloads")

EXPIRES_S = 300  # of presigned URLs: the time in which a client must have begun to read

FormQuery = Annotated[
    DownloadForm, Query(description="`peft`; `merged`: a checkpoint, base included; `gguf`: GGUF-LoRA")
]
Presigned = Annotated[bool, Query(description="answer with URLs of the files where the store is a bucket")]
_URLS = {"schema": schema_reference(DownloadResource.__name__), "example": examples.DOWNLOAD}
_ANSWER: examples.Responses = {
    200: {"description": "a tar archive, or one file", "content": {TAR: {}, FILE: {}, "application/json": _URLS}}
}


@router.get(
    "/adapters/{name}/versions/{version}/download",
    response_class=Response,
    responses=responses(404, 429, 504) | _ANSWER,
)
@may("download")
async def download(
    services: ServicesDep,
    request: Request,
    asking: Asking,
    name: AdapterName,
    version: Annotated[VersionNumber, Path()],
    format: FormQuery = "peft",
    presigned: Presigned = False,
) -> Response:
    """A version's files. Those of `peft` are verified while they are sent: where one is damaged in the store, the
    connection ends before the archive does.

    `merged` and `gguf` are computed for each request, and end with it. 422: the adapter has no such form, this
    machine does not have its base, or not the memory. 429: others are being made. 504: it takes too long here.
    `presigned` is for `peft`; where the store is a folder, the archive comes as without it. Who may not know how the
    version was made gets the archive, with a manifest that does not say it.
    """
    found = await run_in_threadpool(_noted, services, asking, name, version, format)
    if format == "peft":
        if presigned:
            urls = await run_in_threadpool(_presigned, services, found)
            if urls is not None:
                return Response(
                    urls.model_dump_json(), media_type="application/json", headers={"Cache-Control": "no-store"}
                )
        return await send_adapter(services, asking, found)
    num_bytes = await run_in_threadpool(services.conversions.num_bytes, format, found.manifest)
    async with AsyncExitStack() as held:
        await held.enter_async_context(services.downloads.one(asking.tenant))
        held.enter_context(services.conversions.place(asking.tenant))
        made = held.enter_context(services.scratch.folder(num_bytes)) / "made"
        await services.conversions.make(format, found.ref, made, client=request)
        archive = as_it_is(made) if format == "gguf" else await run_in_threadpool(as_tar, made, label_of(found))
        return ArchiveResponse(archive, held.pop_all(), found, format)


def _noted(services: Services, asking: Asking, name: str, version: int, form: DownloadForm) -> AdapterVersion:
    """The version, of whose download the audit log has an entry."""
    catalog = services.catalog_of(asking)
    found = catalog.version(name, version)
    catalog.note("download", found.label, tenant=found.tenant, form=form)
    return found


def _presigned(services: Services, found: AdapterVersion) -> DownloadResource | None:
    """None where the store has no URLs, and where its manifest tells more than the caller may know."""
    if services.store.manifest(found.digest) != found.manifest:
        return None
    ends = datetime.now(UTC) + timedelta(seconds=EXPIRES_S)
    files = services.store.presigned(found.digest, EXPIRES_S)
    if files is None:
        return None
    shown = (
        PresignedFileResource(name=file.name, sha256=file.sha256, nbytes=file.num_bytes, url=file.url) for file in files
    )
    return DownloadResource(files=tuple(shown), expires_at=ends)
