"""The pages of keys and tenants, and of usage."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, NamedTuple

from fastapi import Path, Query, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from loray.errors import SpecError
from loray.schemas.access import KeyCreation, KeyResource, TenantCreation
from loray.schemas.resources import UsageResource
from loray.service import DirectCatalog
from loray.spec import SCOPES, TENANT_SCOPES, JobId, Principal, TenantName, UsageGroup
from serve_apps.auth import CurrentPrincipal, may
from serve_apps.console.backend import Console, ConsoleDep
from serve_apps.console.rendering import Form, checked, led_to, page_router, read_form

_PAGE = 50  # keys
_TENANTS = 200
_ROWS = 200  # sums of usage
_BAR, _HEIGHT = 16, 120  # units of the picture

KeyPath = Annotated[JobId, Path()]

router = page_router()


@router.get("/keys")
@may("manage_own")
def list_keys(
    console: ConsoleDep,
    request: Request,
    asking: CurrentPrincipal,
    cursor: JobId | None = None,
    tenant: Annotated[str, Query(max_length=96)] = "",
) -> Response:
    """Show keys newest first, those revoked included: the own tenant's, and to administrators all."""
    catalog = console.backend.catalog_of(asking)
    tenants = catalog.tenants.all(limit=_TENANTS + 1) if asking.is_admin else ()
    page = catalog.keys.page(limit=_PAGE, cursor=cursor, tenant=tenant or None)
    return console.renderer.page(
        request,
        "keys.html",
        keys=[KeyResource.of(key) for key in page.items],
        fixed=set() if asking.is_admin else {key.id for key in page.items if key.scopes - TENANT_SCOPES},
        more=page.next,
        tenants=tenants[:_TENANTS],
        is_cut=len(tenants) > _TENANTS,
        tenant=tenant,
        scopes=[scope for scope in SCOPES if asking.is_admin or scope in TENANT_SCOPES],
    )


@router.post("/keys")
@may("manage_own")
async def create_key(console: ConsoleDep, request: Request, asking: CurrentPrincipal) -> Response:
    """Make a key, which is in this answer and nowhere else."""
    wanted = _key(await read_form(request))
    made = await run_in_threadpool(lambda: _access_of(console, asking).create_key(wanted))
    return console.renderer.page(request, "parts/new_key.html", 201, made=made)


@router.post("/keys/{id}/revoke")
@may("manage_own")
def revoke_key(console: ConsoleDep, request: Request, asking: CurrentPrincipal, id: KeyPath) -> Response:
    """Revoke a key for ever: every server refuses it within two seconds."""
    _access_of(console, asking).revoke_key(id)
    return led_to(request, "/keys")


@router.post("/tenants")
@may("manage")
async def create_tenant(console: ConsoleDep, request: Request, asking: CurrentPrincipal) -> Response:
    wanted = checked(TenantCreation, {"name": (await read_form(request)).get("name")})
    await run_in_threadpool(lambda: _access_of(console, asking).create_tenant(wanted.name))
    return led_to(request, "/keys")


@router.post("/tenants/{name}/block")
@may("manage")
def block_tenant(
    console: ConsoleDep, request: Request, asking: CurrentPrincipal, name: Annotated[TenantName, Path()]
) -> Response:
    """Block a tenant with all its keys, or let it pass again."""
    catalog = console.backend.catalog_of(asking)
    catalog.tenants.update(name, blocked=not catalog.tenants.get(name).blocked)
    return led_to(request, "/keys")


@router.get("/usage")
@may("identify")
def show_usage(
    console: ConsoleDep,
    request: Request,
    asking: CurrentPrincipal,
    by: UsageGroup = "model",
    days: Annotated[int, Query(ge=1, le=90)] = 30,
) -> Response:
    """Show the own tenant's usage, and to administrators that of all."""
    catalog, tenant = console.backend.catalog_of(asking), None if asking.is_admin else asking.tenant
    today = datetime.now(UTC).date()
    first = today - timedelta(days=days - 1)
    since = datetime(first.year, first.month, first.day, tzinfo=UTC)
    rows = catalog.usage.sums([by], tenant=tenant, since=since, limit=_ROWS + 1)
    daily = catalog.usage.sums(["day"], tenant=tenant, since=since, limit=days + 1)
    return console.renderer.page(
        request,
        "usage.html",
        by=by,
        days=days,
        rows=rows[:_ROWS],
        is_cut=len(rows) > _ROWS,
        bars=bars_of(daily, first, days),
        bar=_BAR,
        height=_HEIGHT,
    )


def _access_of(console: Console, asking: Principal) -> DirectCatalog:
    return DirectCatalog(console.backend.catalog_of(asking))


def _key(form: Form) -> KeyCreation:
    given: dict[str, Any] = {name: form.get(name) for name in ("key_alias", "tenant", "duration") if form.get(name)}
    if models := form.get("models"):
        given["models"] = [model.strip() for model in models.split(",") if model.strip()]
    if limit := form.get("rpm_limit"):
        if not limit.isdecimal():
            raise SpecError("requests a minute must be a whole number")
        given["rpm_limit"] = int(limit)
    return checked(KeyCreation, given | {"scopes": form.all("scopes")})


class Bar(NamedTuple):
    """The picture of a day's output tokens."""

    x: int
    height: float
    day: date
    num_tokens: int


def bars_of(rows: Sequence[UsageResource], first: date, days: int) -> list[Bar]:
    """Make a bar for each day from `first` on, the highest of the picture's height."""
    tokens = {row.day: row.num_output_tokens for row in rows}
    most = max(tokens.values(), default=0) or 1
    shown = [(number, first + timedelta(days=number)) for number in range(days)]
    return [Bar(n * _BAR, _HEIGHT * tokens.get(d, 0) / most, d, tokens.get(d, 0)) for n, d in shown]
