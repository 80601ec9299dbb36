"""Routes of canaries: a share of an alias's requests for another version. The ETag is the alias's."""

from __future__ import annotations

from loray.api.canaries import CanaryResource, CanaryTarget
from serve_apps.access import may
from serve_apps.api import examples
from serve_apps.api.preconditions import Conditional
from serve_apps.api.problems import responses
from serve_apps.api.routes import router_of
from serve_apps.api.services import AdapterName, AliasPath, Asking, ServicesDep

router = router_of("aliases")

_PATH = "/adapters/{name}/aliases/{alias}/canary"


@router.get(_PATH, responses=responses(403, 404) | examples.ok(examples.CANARY))
@may("read")
def get_canary(services: ServicesDep, asking: Asking, name: AdapterName, alias: AliasPath) -> CanaryResource:
    """The alias's canary, with what its gateways have counted; where none runs, the last one and how it ended.

    403: the adapter is another tenant's.
    """
    return CanaryResource.of(services.catalog_of(asking).canary(name, alias))


@router.put(_PATH, responses=responses(403, 404, 409, 412) | examples.ok(examples.CANARY))
@may("promote")
def put_canary(
    services: ServicesDep,
    asking: Asking,
    name: AdapterName,
    alias: AliasPath,
    target: CanaryTarget,
    conditions: Conditional,
) -> CanaryResource:
    """Give a version a share of the alias's requests, or change the share or the bounds of its canary.

    What has been counted stays. Preconditions are on the alias's ETag, as of its own PUT. 409: another version is the
    canary, the alias points at this one, or the gate refuses it.
    """
    catalog = services.catalog_of(asking)
    expected = conditions.expected_revision(catalog.alias(name, alias).revision, alias)
    state = catalog.set_canary(
        name,
        alias,
        target.version,
        target.percent,
        bounds=target.bounds,
        expected_revision=expected,
        no_gate=target.no_gate,
    )
    return CanaryResource.of(state)


@router.delete(_PATH, responses=responses(403, 404, 412) | examples.ok(examples.CANARY))
@may("promote")
def end_canary(
    services: ServicesDep, asking: Asking, name: AdapterName, alias: AliasPath, conditions: Conditional
) -> CanaryResource:
    """Give all requests to the version that the alias points at. Moving the alias, or rolling it back, does it too."""
    catalog = services.catalog_of(asking)
    expected = conditions.expected_revision(catalog.alias(name, alias).revision, alias)
    return CanaryResource.of(catalog.end_canary(name, alias, expected_revision=expected))
