"""`loray open`: pages of the server."""

from __future__ import annotations

import click

from loray.cli.interactive.target import target, url_option
from loray.cli.output import emit

_PATHS = {"console": "/console", "metrics": "/metrics", "docs": "/docs"}


@click.command("open")
@click.argument("page", type=click.Choice(list(_PATHS)), default="console")
@click.option("--print", "only_print", is_flag=True, help="Print the URL instead.")
@click.option("--json", "as_json", is_flag=True, help="Print the URL as JSON instead.")
@url_option
def open_page(page: str, only_print: bool, as_json: bool, url: str | None) -> None:
    """Open PAGE of the server in a browser: its console (default), its metrics, or the documentation of its API."""
    address = target(url) + _PATHS[page]
    if as_json:
        emit({"url": address})
        return
    click.echo(address)
    if not only_print and click.launch(address) != 0:
        click.echo("no browser was found; open the address above", err=True)
