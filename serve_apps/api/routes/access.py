"""Routes of keys, tenants, the audit log and usage."""

from __future__ import annotations

from datetime import datetime
from typing import Annotated

from fastapi import Path, Query, Request, Response

from loray.policy.auth import check
from loray.schemas.access import (
    AuditResource,
    KeyChange,
    KeyCreation,
    KeyResource,
    Moment,
    NewKeyResource,
    Rotation,
    TenantChange,
    TenantCreation,
    TenantResource,
)
from loray.schemas.resources import WRITTEN_OUT, Page, UsageResource
from loray.spec import JobId, KeyAlias, QualifiedName, TenantName, UsageGroup
from serve_apps.api.problems import responses
from serve_apps.api.routes import CREATED, AccessRoute, router_of
from serve_apps.api.services import Limit, linked
from serve_apps.auth import CurrentPrincipal, may
from serve_apps.console import Service

KeyPath = Annotated[JobId, Path(description="the id of a key, `key-…`, which is no secret")]
TenantPath = Annotated[TenantName, Path(description="name of a tenant")]
Cursor = Annotated[int | None, Query(ge=1, le=1 << 62, description="`next` of the page before")]
_Groups = Annotated[
    list[UsageGroup], Query(description="`tenant`, `key`, `model` (an adapter or a base), `day` in UTC; none: one sum")
]
_Time = Annotated[datetime, WRITTEN_OUT]
TEXT = r"^[^\x00-\x1f]*$"  # PostgreSQL has no zero byte
_KEY_ID = r"^[A-Za-z0-9_-]{1,32}$"
_MOST_ROWS = 10**9  # to be passed over
_NO_STORE = {"Cache-Control": "no-store"}

router, usage_router = router_of("access", AccessRoute), router_of("usage")


@router.post("/keys", status_code=201, responses=responses(404, 409) | CREATED)
@may("manage_own")
def create_key(service: Service, request: Request, response: Response, wanted: KeyCreation) -> NewKeyResource:
    """Make a key. It is in this answer, and nowhere else: the catalog keeps its SHA-256.

    An administrator of one tenant makes keys of it, with the scopes `infer`, `publish`, `promote` and `train`, and with
    limits within the tenant's: others are 403.
    """
    made = service.create_key(wanted)
    response.headers.update(_NO_STORE | {"Location": request.url_for("get_key", id=made.id).path})
    return made


@router.get("/keys", responses=responses())
@may("manage_own")
def list_keys(
    service: Service,
    request: Request,
    response: Response,
    limit: Limit = 100,
    cursor: Annotated[JobId | None, Query(description="`next` of the page before")] = None,
    tenant: Annotated[TenantName | None, Query(description="only keys of this tenant")] = None,
    key_alias: Annotated[KeyAlias | None, Query(description="only keys with this alias")] = None,
) -> Page[KeyResource]:
    """Keys, newest first, those revoked included: of the own tenant, and for administrators of all."""
    return linked(service.key_page(limit, cursor, tenant=tenant, key_alias=key_alias), request, response)


@router.get("/keys/self", responses=responses(404))
@may("identify")
def get_own_key(service: Service) -> KeyResource:
    """The key of this request. 404: it has none, or one of the deployment itself."""
    return service.key()


@router.get("/keys/{id}", responses=responses(404))
@may("manage_own")
def get_key(service: Service, id: KeyPath) -> KeyResource:
    """One key."""
    return service.key(id)


@router.patch("/keys/{id}", responses=responses(404, 409))
@may("manage_own")
def change_key(service: Service, id: KeyPath, change: KeyChange) -> KeyResource:
    """Change alias, models, end, limits or metadata of a key, block it, or let it pass again.

    Servers follow within two seconds. A key is blocked with those that it was rotated from and into. 409: another key
    of the tenant has the alias.
    """
    return service.change_key(id, change)


@router.delete("/keys/{id}", responses=responses(404))
@may("manage_own")
def revoke_key(
    service: Service,
    id: KeyPath,
    only_this: Annotated[bool, Query(description="the keys that it was rotated from and into go on")] = False,
) -> KeyResource:
    """Revoke a key for ever, with those that it was rotated from and into: every server refuses them within two
    seconds, and answers that are under way end.
    """
    return service.revoke_key(id, only_this=only_this)


@router.post("/keys/{id}/rotate", status_code=201, responses=responses(404, 409))
@may("identify")
def rotate_key(
    service: Service, response: Response, id: KeyPath, asking: CurrentPrincipal, rotation: Rotation
) -> NewKeyResource:
    """Replace a key by one with the same scopes and limits. A key may replace itself, once a day.

    409: it was replaced already, or a third key would go on. The grace period is 30 days at most.
    """
    if asking.key_id != id:
        check(asking, "manage_own")
    response.headers.update(_NO_STORE)
    return service.rotate_key(id, grace_period=rotation.grace_period)


@router.post("/tenants", status_code=201, responses=responses(409))
@may("manage")
def create_tenant(service: Service, wanted: TenantCreation) -> TenantResource:
    """Make a tenant."""
    return service.create_tenant(wanted.name, wanted.limits)


@router.get("/tenants", responses=responses())
@may("manage")
def list_tenants(service: Service) -> Page[TenantResource]:
    """All tenants, by name."""
    return Page[TenantResource](items=service.tenants())


@router.get("/tenants/{name}", responses=responses(404))
@may("manage")
def get_tenant(service: Service, name: TenantPath) -> TenantResource:
    """One tenant."""
    return service.tenant(name)


@router.patch("/tenants/{name}", responses=responses(404))
@may("manage")
def change_tenant(service: Service, name: TenantPath, change: TenantChange) -> TenantResource:
    """Block a tenant with all its keys, let it pass again, or give it other limits."""
    return service.change_tenant(name, change)


@router.get("/audit", responses=responses())
@may("audit")
def read_audit(
    service: Service,
    request: Request,
    response: Response,
    limit: Limit = 100,
    cursor: Cursor = None,
    tenant: Annotated[TenantName | None, Query(description="only of this tenant; for administrators")] = None,
    actor: Annotated[str | None, Query(max_length=96, pattern=TEXT)] = None,
    action: Annotated[str | None, Query(max_length=32, pattern=TEXT, description="such as `promote`")] = None,
    subject: Annotated[str | None, Query(max_length=200, pattern=TEXT, description="what was written")] = None,
    since: Annotated[Moment | None, Query(description="only entries of that time and later")] = None,
) -> Page[AuditResource]:
    """List what was written, newest first: of the key's own tenant, and for administrators of all."""
    found = service.audit_page(limit, cursor, tenant=tenant, actor=actor, action=action, subject=subject, since=since)
    return linked(found, request, response)


@usage_router.get("/usage", responses=responses())
@may("identify")
def get_usage(
    service: Service,
    request: Request,
    response: Response,
    limit: Limit = 100,
    cursor: Annotated[int, Query(ge=0, le=_MOST_ROWS, description="`next` of the page before")] = 0,
    group_by: _Groups = [],  # noqa: B006 - FastAPI copies it
    tenant: Annotated[TenantName | None, Query(description="for administrators; others have their own")] = None,
    key_id: Annotated[str | None, Query(pattern=_KEY_ID, description="only this key's requests")] = None,
    model: Annotated[QualifiedName | None, Query(description="only requests to this model")] = None,
    since: Annotated[_Time | None, Query(description="requests that ended then or later")] = None,
    until: Annotated[_Time | None, Query(description="requests that ended before")] = None,
) -> Page[UsageResource]:
    """Requests and their tokens, summed up: of the own tenant, and for administrators of all."""
    found = service.usage_page(
        group_by, limit, cursor, tenant=tenant, key_id=key_id, model=model, since=since, until=until
    )
    return linked(found, request, response)
