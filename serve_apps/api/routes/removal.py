"""Routes that delete names and versions, restore them, lift their quarantine, and hand names to other tenants."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path

from loray.api.resources import AdapterResource, AdapterTransfer, VersionDetail, VersionNumber
from loray.catalog import AdapterEntry, Catalog
from loray.publishing import restore
from serve_apps.access import Asking, may
from serve_apps.api import examples, views
from serve_apps.api.problems import responses
from serve_apps.api.routes import router_of
from serve_apps.api.services import AdapterName, ServicesDep

router = router_of("adapters")

_VERSION = "/adapters/{name}/versions/{version}"


@router.delete("/adapters/{name}", status_code=204, responses=responses(403, 404, 409))
@may("publish")
def delete_adapter(services: ServicesDep, asking: Asking, name: AdapterName) -> None:
    """Delete a name with its versions and aliases. 409: a job trains for it.

    It does not exist any more, but nobody can take the name; it can be restored while the store has its bytes.
    """
    services.catalog_of(asking).delete_adapter(name)


@router.delete(_VERSION, status_code=204, responses=responses(403, 404, 409))
@may("publish")
def delete_version(
    services: ServicesDep, asking: Asking, name: AdapterName, version: Annotated[VersionNumber, Path()]
) -> None:
    """Delete one version. 409: an alias points at it, or it is the only one. Its number is not used again."""
    services.catalog_of(asking).delete_version(name, version)


@router.post("/adapters/{name}/restore", responses=responses(403, 404, 409) | examples.ok(examples.ADAPTER))
@may("publish")
def restore_adapter(services: ServicesDep, asking: Asking, name: AdapterName) -> AdapterResource:
    """Restore a deleted name as it was. 409: the store has its bytes no more."""
    catalog = services.catalog_of(asking)
    restore(name, None, services.store, catalog)
    return _shown(catalog.entry(name), catalog)


@router.post(_VERSION + "/restore", responses=responses(403, 404, 409) | examples.ok(examples.VERSION_DETAIL))
@may("publish")
def restore_version(
    services: ServicesDep, asking: Asking, name: AdapterName, version: Annotated[VersionNumber, Path()]
) -> VersionDetail:
    """Restore a deleted version of a name that exists. 409: the store has its bytes no more."""
    catalog = services.catalog_of(asking)
    restore(name, version, services.store, catalog)
    return views.detail(catalog.version(name, version))


@router.post(
    "/adapters/{name}/transfer",
    responses=responses(403, 404, 409) | examples.ok(examples.ADAPTER | {"tenant": "beta"}),
)
@may("manage")
def transfer_adapter(services: ServicesDep, asking: Asking, name: AdapterName, to: AdapterTransfer) -> AdapterResource:
    """Hand an adapter to another tenant, with versions, aliases, tags and evaluations; for administrators.

    Its old name is free then. 409: the new name is taken, or a job trains for the old one.
    """
    catalog = services.catalog_of(asking)
    return _shown(catalog.transfer(name, to.tenant, to.name), catalog)


@router.delete(_VERSION + "/quarantine", status_code=204, responses=responses(403, 404))
@may("manage")
def release_version(
    services: ServicesDep, asking: Asking, name: AdapterName, version: Annotated[VersionNumber, Path()]
) -> None:
    """Serve a version again on which replicas have died, with the next request. 404: it is not in quarantine."""
    services.catalog_of(asking).release(name, version)


def _shown(entry: AdapterEntry, catalog: Catalog) -> AdapterResource:
    return views.adapter(entry, {fingerprint: base for base, fingerprint in catalog.bases().items()})
