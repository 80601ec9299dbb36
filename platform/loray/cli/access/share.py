"""`loray adapters share, transfer`: which tenants see an adapter, and whose it is."""

from __future__ import annotations

import click

from loray.cli import describe
from loray.cli.output import emit, json_option
from loray.cli.services import open_catalog
from loray.spec import Visibility


@click.command()
@click.argument("name")
@click.option("--with", "tenants", metavar="TENANT,…", help="These tenants see it, and no others.")
@click.option("--public", is_flag=True, help="Every tenant sees it.")
@click.option("--private", is_flag=True, help="Its own tenant alone sees it.")
@json_option
def share(name: str, tenants: str | None, public: bool, private: bool, as_json: bool) -> None:
    """Say who sees NAME and may ask it, beside its own tenant, which alone changes it.

    NAME is `tenant/name`, or a bare name of the default tenant.
    """
    if [tenants is not None, public, private].count(True) != 1:
        raise click.UsageError("give one of --with, --public and --private")
    shared_with = () if tenants is None else tuple(filter(None, (t.strip() for t in tenants.split(","))))
    visibility: Visibility = "public" if public else "private" if private else "shared"
    with open_catalog() as catalog:
        changed = catalog.share(name, visibility, shared_with)
        shown = describe.one_json(changed, catalog)
    if as_json:
        emit(shown)
    else:
        click.echo(f"{changed.name} is seen by {describe.seen_by(changed)}")


@click.command()
@click.argument("name")
@click.option("--to", "tenant", required=True, metavar="TENANT", help="Whose it is to be.")
@click.option("--name", "new_name", help="What it is called there (default: as it is).")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
def transfer(name: str, tenant: str, new_name: str | None, yes: bool, as_json: bool) -> None:
    """Hand NAME to another tenant, with versions, aliases, tags and evaluations. Its old name is free then.

    For administrators. Refused where the tenant has an adapter of that name, or a job trains for it.
    """
    if not yes:
        click.confirm(f"hand {name} to tenant {tenant}? requests for {name} will not find it any more", abort=True)
    with open_catalog() as catalog:
        changed = catalog.transfer(name, tenant, new_name)
        shown = describe.one_json(changed, catalog)
    if as_json:
        emit(shown)
    else:
        click.echo(f"{name} is {changed.name} now")
