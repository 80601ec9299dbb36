"""The route of downloads: a version as the folder that PEFT loads, merged into its base, or as GGUF.

Nothing is in memory as a whole: files go to a folder of this machine, are verified there, and leave from it.
"""

from __future__ import annotations

from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from loray.api.resources import VersionNumber
from loray.api.uploads import DownloadForm, DownloadResource, PresignedFileResource
from loray.catalog import AdapterVersion
from loray.publishing.archive import as_it_is, as_tar, folder_as_tar
from serve_apps.access import may
from serve_apps.api import examples
from serve_apps.api.problems import responses
from serve_apps.api.routes import router_of
from serve_apps.api.services import AdapterName, Asking, Services, ServicesDep
from serve_apps.console.archives import FILE, TAR, ArchiveResponse
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
    """A version's files, of which every byte is verified before it is sent.

    `merged` and `gguf` are computed for each request, and end with it. 422: the adapter has no such form, or this
    machine does not have its base. 429: others are being made. 504: it takes too long here. `presigned` is for
    `peft`; where the store is a folder, the archive comes as without it.
    """
    found = await run_in_threadpool(_noted, services, asking, name, version, format)
    if presigned and format == "peft":
        urls = await run_in_threadpool(_presigned, services, found)
        if urls is not None:
            return Response(
                urls.model_dump_json(), media_type="application/json", headers={"Cache-Control": "no-store"}
            )
    label = f"{found.name.replace('/', '-')}-{version}"
    num_bytes = await run_in_threadpool(_size_of, services, found, format)
    held = ExitStack()
    made = held.enter_context(services.scratch.folder(num_bytes)) / "made"
    try:
        if format == "peft":
            archive = await services.long.run(asking, lambda: folder_as_tar(services.store, found.digest, label, made))
        else:
            held.enter_context(services.conversions.place(asking.tenant))
            await services.conversions.make(format, found.ref, made, client=request)
            archive = as_it_is(made) if format == "gguf" else await run_in_threadpool(as_tar, made, label)
    except BaseException:
        held.close()
        raise
    return ArchiveResponse(archive, held, found.digest, label, format)


def _size_of(services: Services, found: AdapterVersion, form: DownloadForm) -> int:
    """What it takes on this machine's disk."""
    if form == "peft":
        return services.store.num_bytes(found.digest)
    return services.conversions.num_bytes(form, found.manifest)


def _noted(services: Services, asking: Asking, name: str, version: int, form: DownloadForm) -> AdapterVersion:
    """The version, of whose download the audit log has an entry."""
    catalog = services.catalog_of(asking)
    found = catalog.version(name, version)
    catalog.note("download", found.label, tenant=found.tenant, form=form)
    return found


def _presigned(services: Services, found: AdapterVersion) -> DownloadResource | None:
    ends = datetime.now(UTC) + timedelta(seconds=EXPIRES_S)
    files = services.store.presigned(found.digest, EXPIRES_S)
    if files is None:
        return None
    shown = (
        PresignedFileResource(name=file.name, sha256=file.sha256, nbytes=file.num_bytes, url=file.url) for file in files
    )
    return DownloadResource(files=tuple(shown), expires_at=ends)
