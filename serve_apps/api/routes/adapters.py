"""Routes of adapters, their versions, their placement in memory, and base models."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response
from starlette.concurrency import run_in_threadpool

from loray.api.resources import (
    AdapterResource,
    BaseResource,
    Page,
    PlacementResource,
    Registration,
    VersionDetail,
    VersionNumber,
    VersionResource,
)
from loray.catalog import AdapterEntry
from loray.errors import AdapterNotFound
from loray.publishing import Destination, register_stored
from loray.spec import Method, Name
from serve_apps.api import examples, views
from serve_apps.api.problems import responses
from serve_apps.api.services import Limit, NamePath, Services


def create_router(services: Services) -> APIRouter:
    router = APIRouter(tags=["adapters"])

    @router.get("/adapters", responses=responses() | examples.page(examples.ADAPTER, "tone"))
    def list_adapters(
        request: Request,
        response: Response,
        limit: Limit = 100,
        cursor: Annotated[Name | None, Query(description="`next` of the page before")] = None,
        base: Annotated[Name | None, Query(description="only adapters of this base model")] = None,
        method: Annotated[Method | None, Query(description="only adapters of this method")] = None,
    ) -> Page[AdapterResource]:
        """All adapters, in the order of their names. Filters look at the version that the bare name means."""
        found = services.catalog.names(limit=limit + 1, after=cursor or "", base=base, method=method)
        names = {fingerprint: name for name, fingerprint in services.catalog.bases().items()}
        items = tuple(views.adapter(entry, names) for entry in found[:limit])
        return views.page(items, items[-1].name if len(found) > limit else None, request, response)

    @router.get("/adapters/{name}", responses=responses(404) | examples.ok(examples.ADAPTER))
    def get_adapter(name: NamePath) -> AdapterResource:
        """One adapter: what its bare name means, its versions and its aliases."""
        entry = services.catalog.entry(name)
        return views.adapter(entry, {fingerprint: base for base, fingerprint in services.catalog.bases().items()})

    @router.get("/adapters/{name}/versions", responses=responses(404) | examples.page(examples.VERSION, "3"))
    def list_versions(
        request: Request,
        response: Response,
        name: NamePath,
        limit: Limit = 100,
        cursor: Annotated[VersionNumber | None, Query(description="`next` of the page before")] = None,
    ) -> Page[VersionResource]:
        """Versions, newest first."""
        found = services.catalog.versions(name, limit=limit + 1, before=cursor)
        items = tuple(views.version(v) for v in found[:limit])
        return views.page(items, str(items[-1].version) if len(found) > limit else None, request, response)

    @router.get("/adapters/{name}/versions/{version}", responses=responses(404) | examples.ok(examples.VERSION_DETAIL))
    def get_version(name: NamePath, version: Annotated[VersionNumber, Path()]) -> VersionDetail:
        """One version with its manifest: files, recipe, lineage; and all that was measured of it."""
        return views.detail(services.catalog.version(name, version))

    @router.post(
        "/adapters/{name}/versions",
        status_code=201,
        responses=responses(404, 409) | examples.ok(examples.VERSION_DETAIL, 201, location=True),
    )
    def register_version(
        request: Request, response: Response, name: NamePath, registration: Registration
    ) -> VersionDetail:
        """Give an adapter that the store has already a name and a version. A digest keeps the version it has.

        404: the store has no adapter of this digest. 409: the name is a base model's, the number is taken, or the gate
        refuses the aliases.
        """
        fields = registration.model_dump(include={"aliases", "version", "no_gate"})
        version = register_stored(registration.digest, Destination(name, services.store, services.catalog, **fields))
        response.headers["Location"] = request.url_for("get_version", name=name, version=version.version).path
        return views.detail(version)

    @router.get("/adapters/{name}/placement", responses=responses(404) | examples.ok(examples.PLACEMENT))
    async def get_placement(name: NamePath) -> PlacementResource:
        """In which replica's memory each version is; nothing where nothing is served."""
        entry = await run_in_threadpool(lambda: services.catalog.entry(name))
        return await _placement(services, entry)

    @router.get("/bases", responses=responses() | examples.page(examples.BASE, None))
    def list_bases() -> Page[BaseResource]:
        """Base models that the catalog knows, and the VeRA pairs that their adapters share."""
        bases = services.catalog.bases()
        return Page[BaseResource](
            items=tuple(views.base(n, f, services.catalog.projections(f)) for n, f in bases.items())
        )

    return router


async def _placement(services: Services, entry: AdapterEntry) -> PlacementResource:
    versions = {ref.digest: ref.version for ref in entry.versions.values()}
    if not versions:
        raise AdapterNotFound(f"adapter {entry.name!r} has no version")
    found = await services.placements.adapters(list(versions))
    items = (views.placement(p, versions[p.digest]) for p in found if p.digest in versions)
    return PlacementResource(
        name=entry.name, items=tuple(sorted(items, key=lambda item: (-item.version, item.replica)))
    )
