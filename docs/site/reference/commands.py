"""The command line, from its parsers."""

from __future__ import annotations

import inspect
import re

import click

from docs.site.markdown import table
from loray.cli.main import cli


def page() -> str:
    """Every command with its arguments and options."""
    ctx = click.Context(cli, info_name="loray")
    return "# Commands\n\nEach command has `--help`.\n\n" + _section(cli, ctx)


def _section(command: click.Command, ctx: click.Context) -> str:
    usage = " ".join([ctx.command_path, *command.collect_usage_pieces(ctx)])
    parts = [] if command is cli else [f"## {ctx.command_path}\n"]
    parts += [f"```\n{usage}\n```\n", _text(command.help or "")]
    rows = [_row(option, ctx) for option in command.get_params(ctx) if isinstance(option, click.Option)]
    rows = [row for row in rows if not row[0].startswith(("`-h`", "`--help`"))]
    if rows:
        parts.append(table(("option", "value", "default", "meaning"), rows))
    if isinstance(command, click.Group):
        for name in command.list_commands(ctx):
            child = command.get_command(ctx, name)
            if child is not None and not child.hidden:
                parts.append(_section(child, click.Context(child, info_name=name, parent=ctx)))
    return "\n".join(part for part in parts if part)


def _text(help: str) -> str:
    """Help as Markdown: click's paragraphs with \\b keep their lines."""
    blocks = inspect.cleandoc(help).split("\n\n")
    return "\n\n".join(_kept(b) if b.startswith("\b") else " ".join(b.split()) for b in blocks) + "\n"


def _kept(block: str) -> str:
    return "```\n" + block.removeprefix("\b").strip("\n") + "\n```"


def _row(option: click.Option, ctx: click.Context) -> tuple[str, ...]:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    value = "" if option.is_flag else f"`{option.make_metavar(ctx)}`"
    default = option.default if isinstance(option.default, str | int | float) else None
    shown = "" if default in (None, False, "") or option.is_flag else f"`{default}`"
    meaning = option.help or ""
    if option.required:
        meaning += " Required."
    if option.multiple and not re.search("several times|repeatable", meaning):
        meaning += " May be given several times."
    return names, value, shown, meaning
