"""`loray adapters search, tag`: adapters by a part of their names, by what they are, and by tags."""

from __future__ import annotations

from itertools import islice
from typing import Any, get_args

import click

from loray.catalog.checks import parse_tags
from loray.cli import describe
from loray.cli.interactive.completing import complete_models
from loray.cli.output import console, emit, json_option, pairs
from loray.cli.services import open_catalog, open_remote, open_services
from loray.errors import SpecError
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


@click.command()
@click.argument("name", shell_complete=complete_models)
@click.argument("tags", nargs=-1, metavar="[KEY=VALUE]...")
@click.option("--unset", "unset", multiple=True, metavar="KEY", help="Take this tag away; may be given several times.")
@json_option
def tag(name: str, tags: tuple[str, ...], unset: tuple[str, ...], as_json: bool) -> None:
    """Set tags of NAME, take some away, and show those that it has then.

    Tags are for people and programs that look for adapters: `loray adapters search --tag KEY=VALUE`.
    """
    wanted = parse_tags(tags)
    valueless = [key for key, value in wanted.items() if value is None]
    if valueless:
        raise SpecError(f"give {valueless[0]!r} a value, as {valueless[0]}=VALUE")
    with open_catalog() as catalog:
        for key, value in wanted.items():
            catalog.set_tag(name, key, value or "")
        for key in unset:
            catalog.delete_tag(name, key)
        found = dict(catalog.tags(name))
    if as_json:
        emit(found)
    elif not found:
        click.echo(f"{name} has no tags")
    else:
        console().print(pairs(list(found.items())))
