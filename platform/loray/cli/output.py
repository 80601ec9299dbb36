"""The output of commands: tables for people, JSON for programs, progress on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, NamedTuple

import click
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

_PIPED_WIDTH = 160
_BETWEEN_LINES_S = 30.0


def json_option(command: Callable[..., Any]) -> Callable[..., Any]:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")(command)


def emit(data: Any) -> None:
    click.echo(json.dumps(data, indent=2, ensure_ascii=False, default=str))


def tell(shown: str | Table, data: Any, as_json: bool) -> None:
    """Prints `data` as JSON, or what is shown to people."""
    if as_json:
        emit(data)
    elif isinstance(shown, str):
        click.echo(shown)
    else:
        console().print(shown)


def console() -> Console:
    """Returns stdout. If it is no terminal, it is wide, so that a pipe gets whole rows."""
    return Console(width=None if sys.stdout.isatty() else _PIPED_WIDTH, highlight=False)


class Verification(NamedTuple):
    """The result of verifying a base or an adapter: its name, what identifies its bytes, and the damage found."""

    name: str
    identity: dict[str, str]
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        ended: dict[str, Any] = {"ok": True} if self.error is None else {"ok": False, "error": self.error}
        return {"name": self.name, **self.identity, **ended}


def report(verified: Sequence[Verification], as_json: bool) -> None:
    """Prints one line per verification. Exits with 1 if one found damage."""
    if as_json:
        emit([v.to_json() for v in verified])
    for v in verified:
        if v.error is not None:
            click.echo(f"error: {v.error}", err=True)
        elif not as_json:
            click.echo(f"{v.name}: ok")
    if any(v.error is not None for v in verified):
        raise click.exceptions.Exit(1)


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, right: Sequence[str] = ()) -> Table:
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold")
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*("" if cell is None else str(cell) for cell in row))
    return made


def pairs(rows: Sequence[tuple[str, object]]) -> Table:
    """Makes two columns, names on the left; rows without a value are left out."""
    made = Table(box=None, show_header=False, pad_edge=False)
    made.add_column(style="dim")
    made.add_column(overflow="fold")
    for name, value in rows:
        if value not in (None, "", ()):
            made.add_row(name, str(value))
    return made


def count(number: int) -> str:
    """Writes `134515008` as "134.5 M"."""
    for unit, scale in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return str(number)


def when(moment: datetime) -> str:
    return moment.astimezone().strftime("%Y-%m-%d %H:%M")


@contextmanager
def progress_bar() -> Iterator[Callable[[str, float], None]]:
    """Yields a callback (step, share from 0 to 1), to be called when a step begins and as it goes on. On stderr it
    draws one bar per step with the time that is left; if stderr is no terminal, it writes a line every 30 s at most.
    """
    shown = sys.stderr.isatty()
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
        console=Console(stderr=True),
        transient=True,
        disable=not shown,
    )
    steps: dict[str, _ProgressColumn] = {}
    written = time.monotonic()

    def progress(name: str, share: float) -> None:
        nonlocal written
        now = time.monotonic()
        if name not in steps:
            for step in steps.values():
                bar.update(step.task, completed=1.0, left="")
            steps[name] = _ProgressColumn(bar.add_task(name, total=1.0, left=""), now, share)
        left = steps[name].left(now, share)
        bar.update(steps[name].task, completed=share, left=left)
        if not shown and now - written >= _BETWEEN_LINES_S:
            written = now
            click.echo(f"{name}: {share:.0%}" + (f", {left}" if left else ""), err=True)

    with bar:
        yield progress


class _ProgressColumn(NamedTuple):
    """When a step of the work began, and the share of it that was done then."""

    task: TaskID
    began: float
    share: float

    def left(self, now: float, share: float) -> str:
        """`0:12:30 left`, at the speed so far; empty where that is not known."""
        if not self.share < share < 1:
            return ""
        return f"{timedelta(seconds=round((now - self.began) * (1 - share) / (share - self.share)))} left"
