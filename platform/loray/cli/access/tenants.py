"""`loray tenants`: who adapters, keys, jobs and usage belong to."""

from __future__ import annotations

from typing import Any

import click

from loray.api.access import TenantResource
from loray.cli.access.options import describe, limit_options, limits_from
from loray.cli.output import console, emit, json_option, table, when
from loray.cli.services import open_services
from loray.spec import Tenant


@click.group()
def tenants() -> None:
    """Tenants: create, list, limit and block them. What one has, the others do not see unless it is shared."""


@tenants.command()
@click.argument("name")
@limit_options(of_tenant=True)
@json_option
def create(name: str, as_json: bool, **limits: Any) -> None:
    """Make the tenant NAME, with limits for all its keys together."""
    with open_services() as services:
        made = services.catalog.create_tenant(name, limits_from(limits))
    _show(made, as_json, f"made tenant {name}; give it a key with `loray keys create --tenant {name} --scope …`")


@tenants.command("ls")
@json_option
def ls(as_json: bool) -> None:
    """List tenants."""
    with open_services() as services:
        found = services.catalog.tenants()
    if as_json:
        emit([TenantResource.of(tenant).model_dump(mode="json") for tenant in found])
        return
    columns = ("NAME", "LIMITS", "STATE", "CREATED")
    rows = [(t.name, describe(t.limits), "blocked" if t.blocked else "good", when(t.created_at)) for t in found]
    console().print(table(columns, rows))


@tenants.command("set")
@click.argument("name")
@limit_options(of_tenant=True)
@click.option("--blocked/--unblocked", default=None, help="Refuse all its keys, or let them pass again.")
@click.option("--no-limits", is_flag=True, help="Take all limits away before those that are given.")
@json_option
def set_(name: str, blocked: bool | None, no_limits: bool, as_json: bool, **limits: Any) -> None:
    """Change limits of NAME; those that are left out stay."""
    with open_services() as services:
        before = None if no_limits else services.catalog.tenant(name).limits
        changed = services.catalog.update_tenant(name, limits=limits_from(limits, before), blocked=blocked)
    _show(
        changed, as_json, f"{name}: {describe(changed.limits) or 'no limits'}{', blocked' if changed.blocked else ''}"
    )


def _show(tenant: Tenant, as_json: bool, line: str) -> None:
    if as_json:
        emit(TenantResource.of(tenant).model_dump(mode="json"))
    else:
        click.echo(line)
