"""Routes of adapters, their versions, their placement in memory, and base models."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from loray.api.resources import (
    AdapterChange,
    AdapterResource,
    BaseResource,
    EvaluationReport,
    Page,
    PlacementResource,
    VersionDetail,
    VersionNumber,
    VersionResource,
)
from loray.api.uploads import Registration
from loray.catalog import AdapterEntry, AdapterVersion, Catalog
from loray.catalog.checks import parse_tags
from loray.errors import AdapterNotFound
from loray.publishing import Destination, register_stored
from loray.serving.access import check
from loray.spec import Method, Name, QualifiedName, split_qualified
from serve_apps.access import may
from serve_apps.api import examples, views
from serve_apps.api.problems import responses
from serve_apps.api.routes import router_of
from serve_apps.api.services import AdapterName, Asking, Limit, Services, ServicesDep, TenantQuery

router = router_of("adapters")


@router.get("/adapters", responses=responses() | examples.page(examples.ADAPTER, "tone"))
@may("read")
def list_adapters(
    services: ServicesDep,
    request: Request,
    response: Response,
    asking: Asking,
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
    catalog, tags = services.catalog_of(asking), parse_tags(tag)
    found = catalog.names(
        limit=limit + 1,
        after=cursor or "",
        tenant=tenant,
        base=base,
        method=method,
        search=search,
        tags=tags,
    )
    names = {fingerprint: name for name, fingerprint in catalog.bases().items()}
    items = tuple(views.adapter(entry, names) for entry in found[:limit])
    return views.page(items, items[-1].name if len(found) > limit else None, request, response)


@router.get("/adapters/{name}", responses=responses(404) | examples.ok(examples.ADAPTER))
@may("read")
def get_adapter(services: ServicesDep, asking: Asking, name: AdapterName) -> AdapterResource:
    """One adapter: what its bare name means, its versions and its aliases."""
    return _adapter(services.catalog_of(asking), name)


@router.patch("/adapters/{name}", responses=responses(403, 404) | examples.ok(examples.ADAPTER))
@may("publish")
def change_adapter(services: ServicesDep, asking: Asking, name: AdapterName, change: AdapterChange) -> AdapterResource:
    """Set which other tenants see and ask an adapter: none, those of `shared_with`, or all."""
    catalog = services.catalog_of(asking)
    catalog.share(name, change.visibility, change.shared_with)
    return _adapter(catalog, name)


@router.get("/adapters/{name}/versions", responses=responses(404) | examples.page(examples.VERSION, "3"))
@may("read")
def list_versions(
    services: ServicesDep,
    request: Request,
    response: Response,
    asking: Asking,
    name: AdapterName,
    limit: Limit = 100,
    cursor: Annotated[VersionNumber | None, Query(description="`next` of the page before")] = None,
) -> Page[VersionResource]:
    """Versions, newest first."""
    found = services.catalog_of(asking).versions(name, limit=limit, before=cursor)
    items = tuple(views.version(v) for v in found.versions)
    return views.page(items, None if found.next is None else str(found.next), request, response)


@router.get("/adapters/{name}/versions/{version}", responses=responses(404) | examples.ok(examples.VERSION_DETAIL))
@may("read")
def get_version(
    services: ServicesDep, asking: Asking, name: AdapterName, version: Annotated[VersionNumber, Path()]
) -> VersionDetail:
    """One version with its manifest: files, recipe, lineage; and all that was measured of it."""
    return views.detail(services.catalog_of(asking).version(name, version))


@router.post(
    "/adapters/{name}/versions",
    status_code=201,
    responses=responses(403, 404, 409, 507) | examples.ok(examples.VERSION_DETAIL, 201, location=True),
)
@may("publish")
async def register_version(
    services: ServicesDep,
    request: Request,
    response: Response,
    asking: Asking,
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
    fields = registration.model_dump(include={"aliases", "version", "no_gate"})
    if registration.aliases:
        check(asking, "promote")

    def register() -> AdapterVersion:
        to = Destination(name, services.store, services.catalog_of(asking), **fields)
        if registration.digest is not None:
            return register_stored(registration.digest, to)
        return services.publish_upload(registration, to)

    if registration.digest is None:
        version = await services.long.run(asking.tenant, register)
    else:
        version = await run_in_threadpool(register)
    response.headers["Location"] = _location(request, version)
    return views.detail(version)


@router.post(
    "/adapters/{name}/versions/{version}/evaluations",
    status_code=201,
    responses=responses(404, 409) | examples.ok(examples.VERSION_DETAIL, 201),
)
@may("publish")
def report_evaluations(
    services: ServicesDep,
    asking: Asking,
    name: AdapterName,
    version: Annotated[VersionNumber, Path()],
    report: EvaluationReport,
) -> VersionDetail:
    """Keep with a version what was measured of it elsewhere. `measured_by` is `key` then: LongLoRA's gate does not
    believe it unless the server says so. 409: it has as many as it may.
    """
    return views.detail(services.catalog_of(asking).report_evaluations(name, version, report.evaluations))


@router.get("/adapters/{name}/placement", responses=responses(404) | examples.ok(examples.PLACEMENT))
@may("read")
async def get_placement(services: ServicesDep, asking: Asking, name: AdapterName) -> PlacementResource:
    """In which replica's memory each version is; nothing where nothing is served.

    How often and when it was used is told to administrators: the same bytes may have names of other tenants.
    """
    entry = await run_in_threadpool(lambda: services.catalog_of(asking).entry(name))
    return await _placement(services, entry, with_use=asking.is_admin)


@router.get("/bases", responses=responses() | examples.page(examples.BASE, None))
@may("identify")
def list_bases(services: ServicesDep, asking: Asking) -> Page[BaseResource]:
    """Base models that the catalog knows, and the VeRA pairs that their adapters share."""
    catalog = services.catalog_of(asking)
    items = (views.base(name, f, catalog.projections(f)) for name, f in catalog.bases().items())
    return Page[BaseResource](items=tuple(items))


def _adapter(catalog: Catalog, name: str) -> AdapterResource:
    return views.adapter(catalog.entry(name), {fingerprint: base for base, fingerprint in catalog.bases().items()})


def _location(request: Request, version: AdapterVersion) -> str:
    tenant, name = split_qualified(version.name)
    path = request.url_for("get_version", name=name, version=version.version).path
    return path if tenant is None else f"{path}?tenant={tenant}"


async def _placement(services: Services, entry: AdapterEntry, *, with_use: bool) -> PlacementResource:
    versions = {ref.digest: ref.version for ref in entry.versions.values()}
    if not versions:
        raise AdapterNotFound(f"adapter {entry.name!r} has no version")
    found = await services.placements.adapters(list(versions))
    items = (views.placement(p, versions[p.digest], with_use=with_use) for p in found if p.digest in versions)
    return PlacementResource(
        name=entry.name, items=tuple(sorted(items, key=lambda item: (-item.version, item.replica)))
    )
