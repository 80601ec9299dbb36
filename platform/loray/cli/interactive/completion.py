"""`loray completion`: the script with which a shell completes commands, options and names of adapters."""

from __future__ import annotations

import click

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
