"""Runs `loray` commands so that a signal ends the demo and what it started, wherever it is."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LORAY = str(Path(sys.executable).with_name("loray"))
_GRACE_S = 20.0  # for a command to end after SIGINT
_STOP_S = 120.0  # for jobs and servers to end


class Interrupted(BaseException):
    """A signal has come. It is no Exception, so that nothing takes it for an error of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Commands:
    """The `loray` of this environment. Each command has a session of its own, so that Ctrl-C reaches the demo alone,
    which then ends the command.
    """

    def __init__(self) -> None:
        self._starts = False  # a command that is being started could not be ended yet
        self._signal: int | None = None

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Inside, the first signal raises Interrupted in the main thread; further ones do nothing."""
        before = {number: signal.signal(number, self._interrupt) for number in _SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def __call__(self, *arguments: str, capture: bool = False) -> str:
        """Run a command; return its output if `capture`, else print it. Exits if it fails."""
        code, output = self._run(arguments, capture=capture)
        if code:
            sys.exit(f"\nthe demo stopped: `loray {' '.join(arguments)}` failed")
        return output

    def ask(self, *arguments: str) -> Any:
        """The JSON that a command prints; None where it fails."""
        code, output = self._run((*arguments, "--json"), capture=True, quiet=True)
        return None if code else json.loads(output)

    def stop_all(self, names: tuple[str, ...]) -> None:
        """Stop the jobs that train `names`, and what is served. Signals do not interrupt it."""
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        deadline = time.monotonic() + _STOP_S
        while time.monotonic() < deadline:
            code, output = self._run(("down",), capture=True, quiet=True)
            if code == 0 and "a job is running" not in output:
                return
            for job in self.ask("jobs", "ls") or ():
                if job["name"] in names and job["ended_at"] is None and job["part_of"] is None:
                    self._run(("jobs", "stop", job["id"]), capture=True, quiet=True)
            time.sleep(1.0)
        print("something is left: `.venv/bin/loray jobs ls` and `.venv/bin/loray down` show and stop it")

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_IGN)
        self._signal = number
        if not self._starts:
            raise Interrupted(number)

    def _run(self, arguments: tuple[str, ...], *, capture: bool, quiet: bool = False) -> tuple[int, str]:
        """Return (exit code, output)."""
        self._starts = True
        process = subprocess.Popen(
            [_LORAY, *arguments],
            text=True,
            stdout=subprocess.PIPE if capture else None,
            stderr=subprocess.DEVNULL if quiet else None,
            start_new_session=True,
            env=os.environ | _width(),
        )
        try:
            self._starts = False
            if self._signal is not None and not quiet:
                raise Interrupted(self._signal)
            output, _ = process.communicate()
        except BaseException:
            _end(process)
            raise
        return process.returncode, output or ""


def _end(process: subprocess.Popen[str]) -> None:
    """End a command as Ctrl-C would, and by force where that takes too long."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
            return


def _width() -> dict[str, str]:
    """A command in a session of its own does not learn how wide the terminal is."""
    with contextlib.suppress(OSError):
        return {"COLUMNS": str(os.get_terminal_size(sys.stdout.fileno()).columns)}
    return {}
