"""Routes of aliases and their canaries."""

from __future__ import annotations

from fastapi import Response

from loray.schemas.resources import AliasResource, AliasTarget, CanaryResource, CanaryTarget, Page
from serve_apps.api import examples
from serve_apps.api.problems import Conditional, responses
from serve_apps.api.routes import router_of
from serve_apps.api.services import AdapterName, AliasPath, ServicesDep
from serve_apps.auth import CurrentPrincipal, may

router = router_of("aliases")

_ALIAS = "/adapters/{name}/aliases/{alias}"
_CANARY = _ALIAS + "/canary"


def _tagged(status: int = 200) -> examples.Responses:
    header = {"ETag": {"description": "the revision in quotes", "schema": {"type": "string"}}}
    return examples.ok(examples.ALIAS, status, headers=header)


@router.get("/adapters/{name}/aliases", responses=responses(404) | examples.page(examples.ALIAS, None))
@may("read")
def list_aliases(services: ServicesDep, asking: CurrentPrincipal, name: AdapterName) -> Page[AliasResource]:
    """All aliases of an adapter."""
    return Page[AliasResource](items=services.catalog_of(asking).aliases.of(name))


@router.get(
    _ALIAS,
    response_model=AliasResource,
    responses=responses(404, 412) | {304: {"description": "The client has it"}} | _tagged(),
)
@may("read")
def get_alias(
    services: ServicesDep,
    response: Response,
    asking: CurrentPrincipal,
    name: AdapterName,
    alias: AliasPath,
    conditions: Conditional,
) -> object:
    """Where an alias points. With If-None-Match, 304 where it has not moved; with If-Match, 412 where it has."""
    found = _tag(services.catalog_of(asking).aliases.get(name, alias), response)
    conditions.check_match(found.revision, alias)
    if conditions.found_unchanged(found.revision):
        return Response(status_code=304, headers={"ETag": found.etag})
    return found


@router.put(_ALIAS, responses=responses(403, 404, 409, 412) | _tagged() | _tagged(201))
@may("promote")
def put_alias(
    services: ServicesDep,
    response: Response,
    asking: CurrentPrincipal,
    name: AdapterName,
    alias: AliasPath,
    target: AliasTarget,
    conditions: Conditional,
) -> AliasResource:
    """Point an alias at a version; it is made where it is not set, which is answered with 201. Its canary ends.

    With If-Match only if it has that ETag, with `If-None-Match: *` only if it is not set: 412 where it has moved
    meanwhile. Without either it moves, whoever moved it last. 409: the gate refuses a LongLoRA adapter, by what was
    measured of it; `no_gate` is a reason to move it all the same, and is recorded.
    """
    catalog = services.catalog_of(asking)
    current = {state.alias: state.revision for state in catalog.aliases.of(name)}.get(alias, 0)
    expected = conditions.expected_revision(current, alias)
    state = catalog.aliases.move(name, alias, target.version, expected_revision=expected, no_gate=target.no_gate)
    response.status_code = 200 if current else 201
    return _tag(state, response)


@router.delete(_ALIAS, status_code=204, responses=responses(403, 404, 412))
@may("promote")
def delete_alias(
    services: ServicesDep, asking: CurrentPrincipal, name: AdapterName, alias: AliasPath, conditions: Conditional
) -> None:
    """Take an alias away; versions stay. Preconditions as for PUT."""
    catalog = services.catalog_of(asking)
    expected = conditions.expected_revision(catalog.aliases.get(name, alias).revision, alias)
    catalog.aliases.delete(name, alias, expected_revision=expected)


@router.post(_ALIAS + "/rollback", responses=responses(403, 404, 409, 412) | _tagged())
@may("promote")
def roll_back(
    services: ServicesDep,
    response: Response,
    asking: CurrentPrincipal,
    name: AdapterName,
    alias: AliasPath,
    conditions: Conditional,
) -> AliasResource:
    """Point an alias back at where it pointed before its last move, or end its canary. 409: nothing to go back to."""
    catalog = services.catalog_of(asking)
    expected = conditions.expected_revision(catalog.aliases.get(name, alias).revision, alias)
    return _tag(catalog.aliases.rollback(name, alias, expected_revision=expected), response)


def _tag(found: AliasResource, response: Response) -> AliasResource:
    response.headers["ETag"] = found.etag
    return found


@router.get(_CANARY, responses=responses(403, 404) | examples.ok(examples.CANARY))
@may("read")
def get_canary(services: ServicesDep, asking: CurrentPrincipal, name: AdapterName, alias: AliasPath) -> CanaryResource:
    """The alias's canary, with what its gateways have counted; where none runs, the last one and how it ended.

    403: the adapter is another tenant's.
    """
    return CanaryResource.of(services.catalog_of(asking).canaries.get(name, alias))


@router.put(_CANARY, responses=responses(403, 404, 409, 412) | examples.ok(examples.CANARY))
@may("promote")
def put_canary(
    services: ServicesDep,
    asking: CurrentPrincipal,
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
    expected = conditions.expected_revision(catalog.aliases.get(name, alias).revision, alias)
    state = catalog.canaries.set(
        name,
        alias,
        target.version,
        target.percent,
        bounds=target.bounds,
        expected_revision=expected,
        no_gate=target.no_gate,
    )
    return CanaryResource.of(state)


@router.delete(_CANARY, responses=responses(403, 404, 412) | examples.ok(examples.CANARY))
@may("promote")
def end_canary(
    services: ServicesDep, asking: CurrentPrincipal, name: AdapterName, alias: AliasPath, conditions: Conditional
) -> CanaryResource:
    """Give all requests to the version that the alias points at. Moving the alias, or rolling it back, does it too."""
    catalog = services.catalog_of(asking)
    expected = conditions.expected_revision(catalog.aliases.get(name, alias).revision, alias)
    return CanaryResource.of(catalog.canaries.end(name, alias, expected_revision=expected))
