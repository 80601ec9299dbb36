"""The command line itself and what all commands have in common: errors of one line, JSON, colours for those who see."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from types import SimpleNamespace

import click
import pytest

from loray import __version__
from loray.cli import doctor, main, output
from loray.cli.main import cli
from loray.spec import format_seconds
from tests.cli.run import Loray

COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-7]m")
# What these print is a log, a script or a file's path, or they run until they are stopped.
TEXT = {("bench",), ("serve",), ("down",), ("logs",), ("jobs", "logs"), ("completion",), ("recipes", "init")}


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


def test_help_is_in_groups_and_has_every_command_once(loray: Loray) -> None:
    _, _, listed = loray("--help").out.partition("\nBase models and data:\n")
    titles = re.findall(r"^(\S.*):$", listed, re.M)
    assert titles == ["Train", "Measure and publish", "Serve and ask", "Operate"]
    names = re.findall(r"^  (\w+)  ", listed, re.M)
    assert names == cli.list_commands(click.Context(cli))
    assert len(set(names)) == len(names)
    columns = {line.index(line.split()[1]) for line in listed.splitlines() if re.match(r"  \w", line)}
    assert len(columns) == 1  # in all groups


def test_commands_of_other_packages_have_a_group(loray: Loray, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = EntryPoint("theirs", "loray.cli.shell:completion", main.ENTRY_POINTS)
    known = main._plugins()
    monkeypatch.setattr(main, "_plugins", lambda: {**known, "theirs": theirs})
    assert re.search(r"^From other packages:\n  theirs +Print", loray("--help").out, re.M)
    monkeypatch.setattr(main, "_plugins", dict)
    assert "Serve from one process" not in loray("--help").out
    assert "no command 'serve'" in loray("serve").err


@pytest.mark.parametrize(
    ("line", "path"),
    [
        ("nothing", "loray"),
        ("base nothing", "loray base"),
        ("base add", "loray base add"),
        ("base verify", "loray base verify"),
        ("adapters import x", "loray adapters import"),
        ("base ls --bad", "loray base ls"),
        ("keys update key-1", "loray keys update"),
        ("open nothing", "loray open"),
    ],
)
def test_wrong_usage_ends_with_where_the_usage_stands(loray: Loray, line: str, path: str) -> None:
    result = loray(*line.split())
    assert (result.code, result.out) == (2, "")
    usage, error = result.err.splitlines()
    assert usage.startswith(f"Usage: {path} ")
    assert error.startswith("error: ")
    assert error.endswith(f"; `{path} --help` shows what it takes")


def test_a_group_without_a_command_shows_its_help(loray: Loray) -> None:
    result = loray("base")
    assert (result.code, "Commands:" in result.out + result.err) == (2, True)


@pytest.mark.parametrize(
    ("line", "do"),
    [
        ("adapters show nothing", "`loray adapters ls` lists them"),
        ("adapters import nowhere --name x", "name the one with the adapter's adapter_config.json"),
        ("adapters import . --name x", "it is not a PEFT adapter; name a folder of save_pretrained"),
        ("base add nothing", "name 'smollm2', a folder, or a Hugging Face id (OWNER/NAME)"),
        ("base verify nothing", "add it with `loray base add nothing`"),
        ("keys revoke nothing", "`loray keys ls` lists them"),
        ("jobs logs nothing", "`loray jobs ls` or `GET /api/v1/jobs` lists them"),
        ("chat nothing", "start it with `loray serve` or `loray up`, or set LORAY_URL to a server's address"),
        ("eval perplexity ./nowhere --data nowhere", "name the one with the adapter's adapter_config.json"),
        ("catalog restore nowhere", "`loray catalog backup` writes one"),
        ("catalog backup nowhere/x", "check the path"),
        ("doctor --spec nowhere", "check the path"),
    ],
)
def test_errors_end_with_what_to_do(
    loray: Loray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, do: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = loray(*line.split())
    assert (result.code, result.err.count("\n")) == (1, 1), result
    assert result.err.endswith(f"{do}\n"), result.err


@pytest.mark.parametrize(
    ("number", "do"),
    [
        (errno.ENOSPC, "set LORAY_HOME to a folder of another disk"),
        (errno.EADDRINUSE, "choose another --port, or stop what listens there"),
        (errno.EIO, "LORAY_LOG_LEVEL=DEBUG shows where"),
    ],
)
def test_errors_of_the_operating_system_end_so_too(
    loray: Loray, monkeypatch: pytest.MonkeyPatch, number: int, do: str
) -> None:
    def fail(home: Path) -> None:
        raise OSError(number, os.strerror(number), "/data/x")

    monkeypatch.setattr("loray.cli.base.list_bases", fail)
    result = loray("base", "ls")
    assert (result.code, result.err.startswith(f"error: {os.strerror(number)}: /data/x; ")) == (1, True)
    assert result.err.endswith(f"{do}\n")


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
