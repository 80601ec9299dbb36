"""Processes of this machine, their processor time, titles and descendants."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

_CPUCLOCK_SCHED = 2  # the scheduler's count, not that of the clock's ticks


def cpu_seconds(pid: int) -> float:
    """Of a process and all its threads since its start, in user and system mode; 0 if it has ended."""
    try:
        return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)  # as clock_getcpuclockid(3)
    except OSError:
        return 0.0


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    found, todo = [], [pid]
    while todo:
        process = todo.pop()
        found.append(process)
        try:
            for children in Path(f"/proc/{process}/task").glob("*/children"):
                todo += map(int, children.read_text(encoding="utf-8").split())
        except OSError:
            continue  # it has ended
    return found


def with_variable(name: str, value: str) -> list[int]:
    """The processes of this user that were started with this environment variable."""
    wanted = f"{name}={value}".encode()
    return [pid for pid in _pids() if wanted in _read(pid, "environ").split(b"\0")]


def title(pid: int) -> str:
    """What `ps` shows of its command."""
    return _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()


@contextmanager
def real_time() -> Iterator[bool]:
    """Meanwhile this thread, and processes that it starts, run as soon as they have something to do, whoever else wants
    the processors: as clients on machines of their own. Yields False, and changes nothing, where this user may not.
    """
    before = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    except PermissionError:
        yield False
        return
    try:
        yield True
    finally:
        os.sched_setscheduler(0, *before)


def _pids() -> Iterable[int]:
    return (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
