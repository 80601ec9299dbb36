"""`loray adapters search`: adapters by a part of their names, and by what they are."""

from __future__ import annotations

from itertools import islice
from typing import Any, get_args

import click

from loray.catalog.checks import parse_tags
from loray.cli import describe
from loray.cli.output import console, emit, json_option
from loray.cli.services import open_remote, open_services
from loray.spec import Method


@click.command()
@click.argument("text", default="")
@click.option("--tag", "tags", multiple=True, metavar="KEY[=VALUE]", help="With this tag; may be given several times.")
@click.option("--base", help="Of this base model.")
@click.option("--method", type=click.Choice(get_args(Method)))
@click.option("--tenant", help="Of this tenant.")
@click.option("--limit", type=click.IntRange(1), default=100, show_default=True)
@json_option
def search(
    text: str,
    tags: tuple[str, ...],
    base: str | None,
    method: str | None,
    tenant: str | None,
    limit: int,
    as_json: bool,
) -> None:
    """List adapters whose names contain TEXT, in upper or lower case."""
    wanted: dict[str, Any] = {"search": text or None, "tags": parse_tags(tags), "base": base, "method": method}
    with open_remote() as client:
        if client is not None:
            rows = describe.of_resources(islice(client.adapters(**wanted, tenant=tenant), limit + 1))
        else:
            with open_services() as services:
                found = services.catalog.names(limit=limit + 1, tenant=tenant, **wanted)
                bases = {fingerprint: name for name, fingerprint in services.catalog.bases().items()}
            rows = [describe.entry_json(entry, bases) for entry in found]
    if as_json:
        emit(rows[:limit])
    elif not rows:
        click.echo("no adapter is like that; `loray adapters ls` lists all")
    else:
        console().print(describe.adapters(rows[:limit]))
        if len(rows) > limit:
            click.echo(f"the first {limit}; there are more (--limit)")
