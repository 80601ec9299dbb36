"""Commands of `loray` in fenced blocks of Markdown, and whether the parsers know them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import NamedTuple

import click

from loray.cli.main import cli

_FENCED = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<text>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL
)
_MARK = re.compile(r"<!-- not run: \S.*-->\n *\Z")
_ENDS = re.compile(r"[;&|()<>`]+")
_ELLIPSIS = re.compile(r"…|\.\.\.")


class Block(NamedTuple):
    """`is_marked`: the page says why it is not run."""

    language: str
    text: str
    is_marked: bool


def blocks(page: str) -> Iterator[Block]:
    """Fenced blocks, with the marks before them."""
    for found in _FENCED.finditer(page):
        yield Block(found["language"], found["text"], _MARK.search(page, 0, found.start()) is not None)


def commands(text: str) -> Iterator[list[str]]:
    """The words behind `loray` of each such command in a block, but not in texts of here-documents."""
    heredoc = ""
    for line in text.replace("\\\n", " ").splitlines():
        if heredoc:
            heredoc = "" if line.strip() == heredoc else heredoc
            continue
        found = re.search(r"<<-?\s*'?(\w+)'?", line)
        heredoc = found[1] if found else ""
        if "loray " in line:
            yield from _of_line(line)


def _of_line(line: str) -> Iterator[list[str]]:
    splitter = shlex.shlex(line, posix=True, punctuation_chars=";&|()<>`")
    splitter.whitespace_split = True
    words: list[str] | None = None
    starts = True  # here a command may begin
    for word in _words(splitter):
        if _ENDS.fullmatch(word):
            if words is not None:
                yield words
            words, starts = None, True
        elif words is not None:
            words.append(word)
        elif starts and word == "loray":
            words = []
        else:
            starts = starts and (re.match(r"\w+=", word) is not None or word in ("$", "do", "then"))
    if words is not None:
        yield words


def _words(splitter: shlex.shlex) -> Iterator[str]:
    try:
        yield from splitter
    except ValueError:  # a quotation that goes on in the next line: no command of ours does
        return


def problem(words: list[str]) -> str | None:
    """Why the command line would be refused before anything is done; None where it would not be."""
    try:
        _parse(cli, _shown(words), click.Context(cli, info_name="loray"))
    except click.UsageError as e:
        return e.format_message()
    return None


def _shown(words: list[str]) -> list[str]:
    """Without an ellipsis, and with what is in brackets because it may be left out."""
    optional = any(word.startswith("[-") for word in words)
    return [word.strip("[]") if optional else word for word in words if not _ELLIPSIS.fullmatch(word)]


def _parse(command: click.Command, words: list[str], ctx: click.Context) -> None:
    if isinstance(command, click.Group):
        if not words or words[0] in ("--help", "--version"):
            return
        name, below, rest = command.resolve_command(ctx, words)
        assert below is not None
        _parse(below, rest, click.Context(below, info_name=name, parent=ctx))
        return
    options, arguments, _ = command.make_parser(ctx).parse_args(list(words))
    for parameter in command.params:
        given = options.get(parameter.name or "")
        if isinstance(parameter, click.Argument) and parameter.required and not isinstance(given, str | tuple):
            raise click.UsageError(f"{parameter.name} is missing")
        if isinstance(parameter.type, click.Choice):
            for value in given if isinstance(given, list | tuple) else (given,):
                if isinstance(value, str):
                    parameter.type.convert(value, parameter, ctx)
    if arguments:
        raise click.UsageError(f"unexpected {arguments}")
