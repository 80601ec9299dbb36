"""`loray open`: pages of the server."""

from __future__ import annotations

import click

from loray.cli.interactive.target import target, url_option

_PATHS = {"console": "/console", "metrics": "/metrics", "docs": "/docs"}


@click.command("open")
@click.argument("page", type=click.Choice(list(_PATHS)), default="console")
@click.option("--print", "only_print", is_flag=True, help="Print the URL instead.")
@url_option
def open_page(page: str, only_print: bool, url: str | None) -> None:
    """Open PAGE of the server in a browser: its console (default), its metrics, or the documentation of its API."""
    address = target(url) + _PATHS[page]
    click.echo(address)
    if not only_print and click.launch(address) != 0:
        click.echo("no browser was found; open the address above", err=True)
