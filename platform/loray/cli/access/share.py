"""`loray adapters share`: which tenants see an adapter."""

from __future__ import annotations

import click

from loray.cli import describe
from loray.cli.output import emit, json_option
from loray.cli.services import open_services
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
    with open_services() as services:
        entry = services.catalog.share(name, visibility, shared_with)
        bases = {fingerprint: base for base, fingerprint in services.catalog.bases().items()}
    if as_json:
        emit(describe.entry_json(entry, bases))
    else:
        click.echo(f"{entry.name} is seen by {describe.seen_by(entry)}")
