"""Servers that this machine's loray starts and that outlive it: processes as /proc shows them, ports, state files."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

LOOPBACK = "127.0.0.1"

_GRACE_S = 3.0


@dataclass(frozen=True, slots=True)
class Server:
    """A server process that outlives whoever started it; it leads a session of its own.

    `started` is the kernel's start time of process `pid`, and `scope` where both hold: a reused pid is not mistaken for
    the server.
    """

    pid: int
    started: int
    scope: str

    @property
    def is_alive(self) -> bool:
        """False in another scope, which cannot see it."""
        return self.scope == pid_scope() and start_time(self.pid) == self.started

    def end(self) -> None:
        """End every process of its session; each is given a moment to end by itself.

        A session outlives its leader, and Linux gives no new process its number meanwhile: a pid that another process
        has by now means that the session is empty. Nothing is done in another scope: the number would be a stranger's.
        """
        if self.scope != pid_scope() or start_time(self.pid) not in (None, self.started):
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            for member in session_members(self.pid):
                kill(member, number)
            deadline = time.monotonic() + _GRACE_S
            while time.monotonic() < deadline and session_members(self.pid):
                time.sleep(0.05)


S = TypeVar("S", bound=Server)


def spawn(command: Sequence[str], *, log_file: Path, cwd: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a server. It outlives this command, Ctrl-C is not for it, and both its outputs go to `log_file`."""
    with log_file.open("w", encoding="utf-8") as out:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=cwd,
            env=env,
        )


def identity(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    """Fields of Server."""
    return {"pid": process.pid, "started": start_time(process.pid) or 0, "scope": pid_scope()}


def leave_running(process: subprocess.Popen[bytes]) -> None:
    """Nobody waits for it: it outlives this process."""
    process.returncode = 0


def write_state(path: Path, server: Server) -> None:
    write_private(path, json.dumps(asdict(server), indent=2) + "\n")


def read_state(path: Path, kind: type[S]) -> S | None:
    """What `write_state` wrote; None where there is none, or one of another version."""
    try:
        return kind(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


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
