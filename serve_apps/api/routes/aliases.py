"""Routes of aliases and their canaries."""

from __future__ import annotations

from fastapi import Response

from loray.schemas.resources import AliasResource, AliasTarget, CanaryResource, CanaryTarget, Page
from serve_apps.api.problems import Conditional, responses
from serve_apps.api.routes import router_of
from serve_apps.api.services import AdapterName, AliasPath
from serve_apps.auth import may
from serve_apps.console import Service

router = router_of("aliases")

_ALIAS = "/adapters/{name}/aliases/{alias}"
_CANARY = _ALIAS + "/canary"
_ETAG = {"headers": {"ETag": {"description": "the revision in quotes", "schema": {"type": "string"}}}}


@router.get("/adapters/{name}/aliases", responses=responses(404))
@may("read")
def list_aliases(service: Service, name: AdapterName) -> Page[AliasResource]:
    """All aliases of an adapter."""
    return Page[AliasResource](items=service.aliases(name))


@router.get(
    _ALIAS,
    response_model=AliasResource,
    responses=responses(404, 412) | {200: _ETAG, 304: {"description": "The client has it"}},
)
@may("read")
def get_alias(
    service: Service,
    response: Response,
    name: AdapterName,
    alias: AliasPath,
    conditions: Conditional,
) -> object:
    """Where an alias points. With If-None-Match, 304 where it has not moved; with If-Match, 412 where it has."""
    found = _tagged(service.alias(name, alias), response)
    conditions.check_match(found.revision, alias)
    if conditions.found_unchanged(found.revision):
        return Response(status_code=304, headers={"ETag": found.etag})
    return found


@router.put(_ALIAS, responses=responses(403, 404, 409, 412) | {200: _ETAG, 201: _ETAG})
@may("promote")
def put_alias(
    service: Service,
    response: Response,
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
    current = {known.alias: known.revision for known in service.aliases(name)}.get(alias, 0)
    etag = conditions.expected(current, alias)
    moved = service.promote(name, alias, target.version, etag=etag, no_gate=target.no_gate)
    response.status_code = 200 if current else 201
    return _tagged(moved, response)


@router.delete(_ALIAS, status_code=204, responses=responses(403, 404, 412))
@may("promote")
def delete_alias(service: Service, name: AdapterName, alias: AliasPath, conditions: Conditional) -> None:
    """Take an alias away; versions stay. Preconditions as for PUT."""
    etag = conditions.expected(service.alias(name, alias).revision, alias)
    service.delete_alias(name, alias, etag=etag)


@router.post(_ALIAS + "/rollback", responses=responses(403, 404, 409, 412) | {200: _ETAG})
@may("promote")
def roll_back(
    service: Service,
    response: Response,
    name: AdapterName,
    alias: AliasPath,
    conditions: Conditional,
) -> AliasResource:
    """Point an alias back at where it pointed before its last move, or end its canary. 409: nothing to go back to."""
    etag = conditions.expected(service.alias(name, alias).revision, alias)
    return _tagged(service.rollback(name, alias, etag=etag), response)


def _tagged(found: AliasResource, response: Response) -> AliasResource:
    response.headers["ETag"] = found.etag
    return found


@router.get(_CANARY, responses=responses(403, 404))
@may("read")
def get_canary(service: Service, name: AdapterName, alias: AliasPath) -> CanaryResource:
    """The alias's canary, with what its gateways have counted; where none runs, the last one and how it ended.

    403: the adapter is another tenant's.
    """
    return service.canary(name, alias)


@router.put(_CANARY, responses=responses(403, 404, 409, 412))
@may("promote")
def put_canary(
    service: Service,
    name: AdapterName,
    alias: AliasPath,
    target: CanaryTarget,
    conditions: Conditional,
) -> CanaryResource:
    """Give a version a share of the alias's requests, or change the share or the bounds of its canary.

    What has been counted stays. Preconditions are on the alias's ETag, as of its own PUT. 409: another version is the
    canary, the alias points at this one, or the gate refuses it.
    """
    etag = conditions.expected(service.alias(name, alias).revision, alias)
    return service.set_canary(
        name, alias, target.version, target.percent, bounds=target.bounds, no_gate=target.no_gate, etag=etag
    )


@router.delete(_CANARY, responses=responses(403, 404, 412))
@may("promote")
def end_canary(service: Service, name: AdapterName, alias: AliasPath, conditions: Conditional) -> CanaryResource:
    """Give all requests to the version that the alias points at. Moving the alias, or rolling it back, does it too."""
    etag = conditions.expected(service.alias(name, alias).revision, alias)
    return service.end_canary(name, alias, etag=etag)
