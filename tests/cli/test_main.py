"""The command line itself and what all commands have in common: errors of one line, JSON, colours for those who see."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

from loray import __version__
from loray.cli import doctor, output
from loray.cli.main import cli
from loray.spec import format_seconds
from tests.cli.run import Loray

COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
# What these print is a log, a script or a file's path, or they run until they are stopped.
TEXT = {("serve",), ("down",), ("logs",), ("jobs", "logs"), ("completion",), ("recipes", "init")}


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def test_commands_have_json() -> None:
    found = {path: {o for p in command.params for o in p.opts} for path, command in commands(cli)}
    assert {path for path in found if "--json" not in found[path]} == TEXT


def test_colours(loray: Loray, monkeypatch: pytest.MonkeyPatch) -> None:
    """None where the output is no terminal; on a terminal, for which FORCE_COLOR stands, none with NO_COLOR."""
    monkeypatch.setattr(doctor, "kernels_problem", lambda: None)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert "\x1b" not in loray("doctor").out
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert COLOUR.search(loray("doctor").out)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not COLOUR.search(loray("doctor").out)


def test_where_nobody_sees_a_bar_lines_say_how_long_it_takes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    times = iter([0.0, 0.0, 10.0, 30.0, 59.0, 65.0])
    monkeypatch.setattr(output, "time", SimpleNamespace(monotonic=lambda: next(times)))
    with output.progress_bar() as progress:
        for share in (0.5, 0.625, 0.75, 0.8, 1.0):  # an earlier run has computed the first half
            progress("base, perplexity", share)
    assert capsys.readouterr().err.splitlines() == ["base, perplexity: 75%, 0:00:30 left", "base, perplexity: 100%"]


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0, "0 ms"), (0.00053, "0.53 ms"), (0.005, "5 ms"), (0.0123456, "12.3 ms"), (0.9994, "999 ms"), (0.9996, "1 s"),
     (1.25, "1.25 s"), (999.4, "999 s"), (999.6, "1,000 s"), (12345.0, "12,345 s")],
)  # fmt: skip
def test_durations_have_three_digits_and_no_exponent(seconds: float, shown: str) -> None:
    assert format_seconds(seconds) == shown


def test_help_and_version(loray: Loray) -> None:
    shown = loray("--help")
    assert shown.code == 0
    for word in ("base", "adapters", "train", "up", "status", "down", "LORAY_HOME"):
        assert word in shown.out
    assert loray("--version").out.strip() == f"loray, version {__version__}"


def test_wrong_usage(loray: Loray) -> None:
    for line in ("nothing", "base add", "base verify", "adapters import x", "base ls --bad"):
        result = loray(*line.split())
        assert result.code == 2
        assert "Usage:" in result.err
        assert result.out == ""


def test_errors_are_one_line(loray: Loray, monkeypatch: pytest.MonkeyPatch) -> None:
    result = loray("adapters", "show", "nothing")
    assert (result.code, result.out) == (1, "")
    assert result.err == "error: no adapter 'nothing'; `loray adapters ls` lists them\n"
    monkeypatch.setenv("LORAY_LOG_LEVEL", "DEBUG")
    assert "Traceback" in loray("adapters", "show", "nothing").err
    monkeypatch.setenv("LORAY_LOG_LEVEL", "LOUD")
    assert loray("adapters", "ls").err.startswith("error: LORAY_LOG_LEVEL='LOUD'")


def test_unexpected_errors_say_how_to_see_more(loray: Loray, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(home: Path) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("loray.cli.base.list_bases", fail)
    result = loray("base", "ls")
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "RuntimeError: a bug (LORAY_LOG_LEVEL=DEBUG" in result.err
