"""The pages of keys and tenants, and of usage."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any, NamedTuple

from fastapi import Path, Query, Request
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool

from loray.errors import SpecError
from loray.schemas.access import KeyCreation, TenantChange, TenantCreation
from loray.schemas.resources import UsageResource
from loray.spec import SCOPES, TENANT_SCOPES, JobId, TenantName, UsageGroup
from serve_apps.auth import CurrentPrincipal, may
from serve_apps.console.backend import ConsoleDep, Service
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
    service: Service,
    request: Request,
    asking: CurrentPrincipal,
    cursor: JobId | None = None,
    tenant: Annotated[str, Query(max_length=96)] = "",
) -> Response:
    """Show keys newest first, those revoked included: the own tenant's, and to administrators all."""
    tenants = service.tenants(limit=_TENANTS + 1) if asking.is_admin else ()
    page = service.key_page(_PAGE, cursor, tenant=tenant or None)
    return console.renderer.page(
        request,
        "keys.html",
        keys=page.items,
        fixed=set() if asking.is_admin else {key.id for key in page.items if set(key.scopes) - TENANT_SCOPES},
        more=page.next,
        tenants=tenants[:_TENANTS],
        is_cut=len(tenants) > _TENANTS,
        tenant=tenant,
        scopes=[scope for scope in SCOPES if asking.is_admin or scope in TENANT_SCOPES],
    )


@router.post("/keys")
@may("manage_own")
async def create_key(console: ConsoleDep, service: Service, request: Request) -> Response:
    """Make a key, which is in this answer and nowhere else."""
    wanted = _key(await read_form(request))
    made = await run_in_threadpool(service.create_key, wanted)
    return console.renderer.page(request, "parts/new_key.html", 201, made=made)


@router.post("/keys/{id}/revoke")
@may("manage_own")
def revoke_key(service: Service, request: Request, id: KeyPath) -> Response:
    """Revoke a key for ever: every server refuses it within two seconds."""
    service.revoke_key(id)
    return led_to(request, "/keys")


@router.post("/tenants")
@may("manage")
async def create_tenant(service: Service, request: Request) -> Response:
    wanted = checked(TenantCreation, {"name": (await read_form(request)).get("name")})
    await run_in_threadpool(service.create_tenant, wanted.name)
    return led_to(request, "/keys")


@router.post("/tenants/{name}/block")
@may("manage")
def block_tenant(service: Service, request: Request, name: Annotated[TenantName, Path()]) -> Response:
    """Block a tenant with all its keys, or let it pass again."""
    service.change_tenant(name, TenantChange(blocked=not service.tenant(name).blocked))
    return led_to(request, "/keys")


@router.get("/usage")
@may("identify")
def show_usage(
    console: ConsoleDep,
    service: Service,
    request: Request,
    by: UsageGroup = "model",
    days: Annotated[int, Query(ge=1, le=90)] = 30,
) -> Response:
    """Show the own tenant's usage, and to administrators that of all."""
    today = datetime.now(UTC).date()
    first = today - timedelta(days=days - 1)
    since = datetime(first.year, first.month, first.day, tzinfo=UTC)
    page = service.usage_page([by], _ROWS, since=since)
    daily = service.usage_page(["day"], days + 1, since=since)
    return console.renderer.page(
        request,
        "usage.html",
        by=by,
        days=days,
        rows=page.items,
        is_cut=page.next is not None,
        bars=bars_of(daily.items, first, days),
        bar=_BAR,
        height=_HEIGHT,
    )


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
