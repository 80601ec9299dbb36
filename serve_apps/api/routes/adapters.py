"""Routes of adapters: names, versions, evaluations, removal, tags and downloads.

No download is in memory as a whole: PEFT's files are sent while they are read from the store, and what is computed goes
to a folder of this machine first.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Annotated

from fastapi import Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from loray.catalog import AdapterVersion
from loray.catalog.entries import parse_tags
from loray.policy.auth import check
from loray.publishing.uploads import as_it_is, as_tar
from loray.schemas.resources import (
    AdapterChange,
    AdapterResource,
    AdapterTransfer,
    BaseResource,
    DownloadForm,
    DownloadResource,
    EvaluationReport,
    Page,
    PlacementResource,
    PresignedFileResource,
    Registration,
    ReplicaAdapter,
    TagChange,
    TagResource,
    VersionDetail,
    VersionNumber,
    VersionResource,
    example_of,
)
from loray.schemas.status import AdapterPlacement
from loray.spec import Method, Name, QualifiedName, TagKey, split_qualified
from serve_apps.api.problems import responses
from serve_apps.api.routes import CREATED, Responses, router_of
from serve_apps.api.services import AdapterName, Limit, Services, ServicesDep, TenantQuery, linked
from serve_apps.auth import CurrentPrincipal, may
from serve_apps.console import Service
from serve_apps.console.archives import FILE, TAR, archive_response, label_of, send_adapter
from serve_apps.http import schema_reference

EXPIRES_S = 300  # of presigned URLs: the time in which a client must have begun to read
_VERSION = "/adapters/{name}/versions/{version}"
_TAG = "/adapters/{name}/tags/{key}"

VersionPath = Annotated[VersionNumber, Path()]
KeyPath = Annotated[TagKey, Path(description="`team`, `stage`, …")]
FormQuery = Annotated[
    DownloadForm, Query(description="`peft`; `merged`: a checkpoint, base included; `gguf`: GGUF-LoRA")
]
Presigned = Annotated[bool, Query(description="answer with URLs of the files where the store is a bucket")]
_URLS = {"schema": schema_reference(DownloadResource.__name__), "example": example_of(DownloadResource)}
_ANSWER: Responses = {
    200: {"description": "a tar archive, or one file", "content": {TAR: {}, FILE: {}, "application/json": _URLS}}
}

router, tags_router, downloads_router = router_of("adapters"), router_of("tags"), router_of("downloads")


@router.get("/adapters", responses=responses())
@may("read")
def list_adapters(
    service: Service,
    request: Request,
    response: Response,
    limit: Limit = 100,
    cursor: Annotated[QualifiedName | None, Query(description="`next` of the page before")] = None,
    tenant: TenantQuery = None,
    base: Annotated[Name | None, Query(description="only adapters of this base model")] = None,
    method: Annotated[Method | None, Query(description="only adapters of this method")] = None,
    search: Annotated[str | None, Query(max_length=96, description="part of the name, in any case")] = None,
    tag: Annotated[tuple[str, ...], Query(max_length=8, description="`key=value`, or `key` for any value")] = (),
) -> Page[AdapterResource]:
    """All adapters of the own tenant, those shared with it and public ones, in the order of their names.

    `base` and `method` look at the version that the bare name means. All filters that are given must hold.
    """
    found = service.adapter_page(
        limit, cursor, tenant=tenant, base=base, method=method, search=search, tags=parse_tags(tag)
    )
    return linked(found, request, response)


@router.get("/adapters/{name}", responses=responses(404))
@may("read")
def get_adapter(service: Service, name: AdapterName) -> AdapterResource:
    """One adapter: what its bare name means, its versions and its aliases."""
    return service.adapter(name)


@router.patch("/adapters/{name}", responses=responses(403, 404))
@may("publish")
def change_adapter(service: Service, name: AdapterName, change: AdapterChange) -> AdapterResource:
    """Set which other tenants see and ask an adapter: none, those of `shared_with`, or all."""
    return service.share(name, change.visibility, change.shared_with)


@router.get("/adapters/{name}/versions", responses=responses(404))
@may("read")
def list_versions(
    service: Service,
    request: Request,
    response: Response,
    name: AdapterName,
    limit: Limit = 100,
    cursor: Annotated[VersionNumber | None, Query(description="`next` of the page before")] = None,
) -> Page[VersionResource]:
    """Versions, newest first."""
    return linked(service.version_page(name, limit, cursor), request, response)


@router.get(_VERSION, responses=responses(404))
@may("read")
def get_version(service: Service, name: AdapterName, version: VersionPath) -> VersionDetail:
    """One version with its manifest: files, recipe, lineage; and all that was measured of it."""
    return service.version(name, version)


@router.post(
    "/adapters/{name}/versions",
    status_code=201,
    responses=responses(403, 404, 409, 507) | CREATED,
)
@may("publish")
async def register_version(
    services: ServicesDep,
    service: Service,
    request: Request,
    response: Response,
    asking: CurrentPrincipal,
    name: AdapterName,
    registration: Registration,
) -> VersionDetail:
    """Give an adapter that the store has, or that was uploaded, a name and a version. A digest keeps the version it
    has.

    An upload is checked as a whole first: format, shapes, ranks, values, against its base. 404: the store has no
    adapter of this digest, or the own tenant has neither uploaded it nor sees it under a name. 403: the name is
    another tenant's, the key may not set aliases, or the tenant has as much as it may. 507: gateways' memory is full
    of names. 409: the name is a base model's, the number is taken, or the
    gate refuses the aliases.
    """
    if registration.aliases:
        check(asking, "promote")
    register = partial(service.register, name, **registration.model_dump())
    if registration.digest is None:
        version = await services.long.run(asking.tenant, register)
    else:
        version = await run_in_threadpool(register)
    tenant, bare = split_qualified(version.name)
    path = request.url_for("get_version", name=bare, version=version.version).path
    response.headers["Location"] = path if tenant is None else f"{path}?tenant={tenant}"
    return version


@router.post(
    _VERSION + "/evaluations",
    status_code=201,
    responses=responses(404, 409),
)
@may("publish")
def report_evaluations(
    service: Service, name: AdapterName, version: VersionPath, report: EvaluationReport
) -> VersionDetail:
    """Keep with a version what was measured of it elsewhere. `measured_by` is `key` then: LongLoRA's gate does not
    believe it unless the server says so. 409: it has as many as it may.
    """
    return service.report_evaluations(name, version, report.evaluations)


@router.get("/adapters/{name}/placement", responses=responses(404))
@may("read")
async def get_placement(
    services: ServicesDep, service: Service, asking: CurrentPrincipal, name: AdapterName
) -> PlacementResource:
    """In which replica's memory each version is; nothing where nothing is served.

    How often and when it was used is told to administrators: the same bytes may have names of other tenants.
    """
    entry = await run_in_threadpool(lambda: service.catalog.adapters.get(name))
    versions = {ref.digest: ref.version for ref in entry.versions.values()}
    found = await services.placements.adapters(list(versions))
    items = [_placed(p, versions[p.digest], with_use=asking.is_admin) for p in found if p.digest in versions]
    return PlacementResource(
        name=entry.name, items=tuple(sorted(items, key=lambda item: (-item.version, item.replica)))
    )


@router.get("/bases", responses=responses())
@may("identify")
def list_bases(service: Service) -> Page[BaseResource]:
    """Base models that the catalog knows, and the VeRA pairs that their adapters share."""
    return Page[BaseResource](items=service.bases())


@router.delete("/adapters/{name}", status_code=204, responses=responses(403, 404, 409))
@may("publish")
def delete_adapter(service: Service, name: AdapterName) -> None:
    """Delete a name with its versions and aliases. 409: a job trains for it.

    It does not exist any more, but nobody can take the name; it can be restored while the store has its bytes.
    """
    service.delete(name)


@router.delete(_VERSION, status_code=204, responses=responses(403, 404, 409))
@may("publish")
def delete_version(service: Service, name: AdapterName, version: VersionPath) -> None:
    """Delete one version. 409: an alias points at it, or it is the only one. Its number is not used again."""
    service.delete(name, version)


@router.post("/adapters/{name}/restore", responses=responses(403, 404, 409))
@may("publish")
def restore_adapter(service: Service, name: AdapterName) -> AdapterResource:
    """Restore a deleted name as it was. 409: the store has its bytes no more."""
    service.restore(name)
    return service.adapter(name)


@router.post(_VERSION + "/restore", responses=responses(403, 404, 409))
@may("publish")
def restore_version(service: Service, name: AdapterName, version: VersionPath) -> VersionDetail:
    """Restore a deleted version of a name that exists. 409: the store has its bytes no more."""
    service.restore(name, version)
    return service.version(name, version)


@router.post(
    "/adapters/{name}/transfer",
    responses=responses(403, 404, 409),
)
@may("manage")
def transfer_adapter(service: Service, name: AdapterName, to: AdapterTransfer) -> AdapterResource:
    """Hand an adapter to another tenant, with versions, aliases, tags and evaluations; for administrators.

    Its old name is free then. 409: the new name is taken, or a job trains for the old one.
    """
    return service.transfer(name, to.tenant, to.name)


@router.delete(_VERSION + "/quarantine", status_code=204, responses=responses(403, 404))
@may("manage")
def release_version(service: Service, name: AdapterName, version: VersionPath) -> None:
    """Serve a version again on which replicas have died, with the next request. 404: it is not in quarantine."""
    service.release(name, version)


@tags_router.get("/adapters/{name}/tags", responses=responses(404))
@may("read")
def list_tags(service: Service, name: AdapterName) -> Page[TagResource]:
    """All tags of an adapter, by key."""
    found = service.tags(name)
    return Page[TagResource](items=tuple(TagResource(key=key, value=value) for key, value in found.items()))


@tags_router.put(_TAG, responses=responses(403, 404, 409) | {201: {}})
@may("publish")
def set_tag(service: Service, response: Response, name: AdapterName, key: KeyPath, change: TagChange) -> TagResource:
    """Set a tag, or give it another value; 201 where the adapter did not have it. 409: it has 100 tags."""
    made = service.catalog.tags.set(name, key, change.value)
    response.status_code = 201 if made else 200
    return TagResource(key=key, value=change.value)


@tags_router.delete(_TAG, status_code=204, responses=responses(403, 404))
@may("publish")
def delete_tag(service: Service, name: AdapterName, key: KeyPath) -> None:
    """Take a tag away."""
    service.delete_tag(name, key)


@downloads_router.get(
    _VERSION + "/download",
    response_class=Response,
    responses=responses(404, 429, 504) | _ANSWER,
)
@may("download")
async def download(
    services: ServicesDep,
    service: Service,
    request: Request,
    asking: CurrentPrincipal,
    name: AdapterName,
    version: VersionPath,
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
    found = await run_in_threadpool(service.record_download, name, version, format)
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
        return archive_response(archive, held.pop_all(), found, format)


def _placed(found: AdapterPlacement, version: int, *, with_use: bool) -> ReplicaAdapter:
    """An adapter in a replica. `version`: that of the requested name; the same bytes may have other names."""
    last_used_at = datetime.fromtimestamp(found.last_used_at, UTC) if with_use and found.last_used_at else None
    shown = found.model_dump(include={"replica", "node", "digest", "nbytes", "tier"})
    return ReplicaAdapter(version=version, uses=found.uses if with_use else None, last_used_at=last_used_at, **shown)


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
