"""`loray tenants`: who adapters, keys, jobs and usage belong to; in the catalog or at the server of LORAY_URL."""

from __future__ import annotations

from typing import Any

import click

from loray.api.access import TenantChange, TenantResource
from loray.cli.access.options import describe, limit_options, limits_from
from loray.cli.access.services import open_access
from loray.cli.output import console, emit, json_option, table, when


@click.group()
def tenants() -> None:
    """Tenants: create, list, limit and block them. What one has, the others do not see unless it is shared.

    With LORAY_URL these commands ask a server, with an administrator's LORAY_API_KEY.
    """


@tenants.command()
@click.argument("name")
@limit_options(of_tenant=True)
@json_option
def create(name: str, as_json: bool, **limits: Any) -> None:
    """Make the tenant NAME, with limits for all its keys together."""
    with open_access() as access:
        made = access.create_tenant(name, limits_from(limits))
    _show(made, as_json, f"made tenant {name}; give it a key with `loray keys create --tenant {name} --scope …`")


@tenants.command("ls")
@json_option
def ls(as_json: bool) -> None:
    """List tenants."""
    with open_access() as access:
        found = access.tenants()
    if as_json:
        emit([tenant.model_dump(mode="json") for tenant in found])
        return
    columns = ("NAME", "LIMITS", "STATE", "CREATED")
    rows = [(t.name, describe(t), "blocked" if t.blocked else "good", when(t.created_at)) for t in found]
    console().print(table(columns, rows))


@tenants.command("set")
@click.argument("name")
@limit_options(of_tenant=True, takes_away=True)
@click.option("--blocked/--unblocked", default=None, help="Refuse all its keys, or let them pass again.")
@click.option("--no-limits", is_flag=True, help="Take all limits away before those that are given.")
@json_option
def set_(name: str, blocked: bool | None, no_limits: bool, as_json: bool, **limits: Any) -> None:
    """Change limits of NAME; those that are left out stay, and `none` takes one away."""
    with open_access() as access:
        before = None if no_limits else access.tenant(name)
        changed = access.change_tenant(name, TenantChange(limits=limits_from(limits, before), blocked=blocked))
    _show(changed, as_json, f"{name}: {describe(changed) or 'no limits'}{', blocked' if changed.blocked else ''}")


def _show(tenant: TenantResource, as_json: bool, line: str) -> None:
    if as_json:
        emit(tenant.model_dump(mode="json"))
    else:
        click.echo(line)
