"""Routes that delete names and versions, and restore them."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from loray.api.resources import AdapterResource, VersionDetail, VersionNumber
from loray.publishing import restore
from serve_apps.access import Asking
from serve_apps.api import examples, views
from serve_apps.api.problems import responses
from serve_apps.api.services import AdapterName, Services

_VERSION = "/adapters/{name}/versions/{version}"


def create_router(services: Services) -> APIRouter:
    router = APIRouter(tags=["adapters"])

    @router.delete("/adapters/{name}", status_code=204, responses=responses(403, 404, 409))
    def delete_adapter(asking: Asking, name: AdapterName) -> None:
        """Delete a name with its versions and aliases. 409: a job trains for it.

        It does not exist any more, but nobody can take the name; it can be restored while the store has its bytes.
        """
        services.catalog_of(asking).delete_adapter(name)

    @router.delete(_VERSION, status_code=204, responses=responses(403, 404, 409))
    def delete_version(asking: Asking, name: AdapterName, version: Annotated[VersionNumber, Path()]) -> None:
        """Delete one version. 409: an alias points at it, or it is the only one. Its number is not used again."""
        services.catalog_of(asking).delete_version(name, version)

    @router.post("/adapters/{name}/restore", responses=responses(403, 404, 409) | examples.ok(examples.ADAPTER))
    def restore_adapter(asking: Asking, name: AdapterName) -> AdapterResource:
        """Restore a deleted name as it was. 409: the store has its bytes no more."""
        catalog = services.catalog_of(asking)
        restore(name, None, services.store, catalog)
        names = {fingerprint: base for base, fingerprint in catalog.bases().items()}
        return views.adapter(catalog.entry(name), names)

    @router.post(_VERSION + "/restore", responses=responses(403, 404, 409) | examples.ok(examples.VERSION_DETAIL))
    def restore_version(asking: Asking, name: AdapterName, version: Annotated[VersionNumber, Path()]) -> VersionDetail:
        """Restore a deleted version of a name that exists. 409: the store has its bytes no more."""
        catalog = services.catalog_of(asking)
        restore(name, version, services.store, catalog)
        return views.detail(catalog.version(name, version))

    return router
