"""`loray open` and `loray completion`."""

from __future__ import annotations

import click

from loray.cli.connect import target, url_option
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


_VARIABLE = "_LORAY_COMPLETE"  # what click asks for in the environment of a program of this name


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the script with which SHELL completes this command.

    \b
    bash  loray completion bash > ~/.local/share/bash-completion/completions/loray
    zsh   loray completion zsh > ~/.zfunc/_loray          (with fpath+=~/.zfunc before compinit)
    fish  loray completion fish > ~/.config/fish/completions/loray.fish
    """
    from click.shell_completion import get_completion_class

    made = get_completion_class(shell)
    assert made is not None
    instance = made(context.find_root().command, {}, "loray", _VARIABLE)
    click.echo(instance.source_template % instance.source_vars())
