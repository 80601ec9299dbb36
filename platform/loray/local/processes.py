"""Servers that this machine's loray starts and that outlive it: processes as /proc shows them, ports, state files."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

LOOPBACK = "127.0.0.1"

_GRACE_S = 3.0


def kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # ended, and maybe another user's already
        os.kill(pid, number)


def session_members(session: int) -> list[int]:
    """Living processes of the session, whoever their parent is now."""
    members = []
    for folder in Path("/proc").glob("[0-9]*"):
        fields = _stat_fields(int(folder.name))
        if fields is not None and int(fields[3]) == session:
            members.append(int(folder.name))
    return members


def start_time(pid: int) -> int | None:
    """Clock ticks after boot at which `pid` started; None where it does not run (a zombie does not)."""
    fields = _stat_fields(pid)
    return None if fields is None else int(fields[19])


def pid_scope() -> str:
    """Where pids and start times mean what they mean here: until the next boot, in this container."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def is_alive(pid: int, started: int, scope: str) -> bool:
    """Whether the process that was seen under these three still runs. False in another scope, which cannot see it."""
    return scope == pid_scope() and start_time(pid) == started


def end_session(pid: int, started: int, scope: str) -> None:
    """End every process of the session that `pid` leads; each is given a moment to end by itself.

    A session outlives its leader, and Linux gives no new process its number meanwhile: a pid that another
    process has by now means that the session is empty. Nothing is done where `scope` is not this one: the number
    would be a stranger's.
    """
    if scope != pid_scope() or start_time(pid) not in (None, started):
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        for member in session_members(pid):
            kill(member, number)
        deadline = time.monotonic() + _GRACE_S
        while time.monotonic() < deadline and session_members(pid):
            time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    """Distinct ports that nobody listens on just now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind((LOOPBACK, 0))
        return [int(s.getsockname()[1]) for s in sockets]


@contextmanager
def exclusive(lock_file: Path) -> Iterator[None]:
    """One process at a time starts or stops what the file stands for."""
    with lock_file.open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        yield


def write_private(path: Path, text: str) -> None:
    """In one step, for this user's eyes alone."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as f:
        f.write(text)
    temporary.replace(path)


def log_tail(log_file: str, num_lines: int = 15) -> str:
    """The end of a log, to be added to an error's message."""
    try:
        lines = Path(log_file).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return f"; the end of {log_file}:\n" + "\n".join(f"  {line}" for line in lines[-num_lines:])


def _stat_fields(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third on; None where `pid` has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields
