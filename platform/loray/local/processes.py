"""Servers on this machine that outlive the command that starts them: processes, ports, state files."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from loray.errors import ClusterError
from loray.files import boot_id, write_private

LOOPBACK = "127.0.0.1"

_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class Process:
    """A process as a file records it.

    `started` is the kernel's start time of process `pid`, and `scope` is the boot and the container in which both are
    valid, so that a reused pid is not mistaken for the process.
    """

    pid: int
    started: int
    scope: str

    @property
    def is_alive(self) -> bool:
        """The process runs. False in another scope, from which it cannot be seen."""
        return self.scope == pid_scope() and start_time(self.pid) == self.started

    @property
    def is_of_this_boot(self) -> bool:
        """Its pid means something here: it was started in this boot and this container."""
        return self.scope == pid_scope()


@dataclass(frozen=True, slots=True)
class LocalServer(Process):
    """A server process that outlives the process that started it. It leads a session of its own."""

    grace_s: ClassVar[float] = 3.0  # from SIGTERM to SIGKILL

    def end(self) -> None:
        """End every process of its session: with SIGTERM, then with SIGKILL.

        A session can outlive its leader. Linux does not reuse its number until the session is empty, so if another
        process has the pid, nothing is left to end. In another scope the number means another process, so nothing is
        done.
        """
        if self.scope != pid_scope() or start_time(self.pid) not in (None, self.started):
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            for member in session_members(self.pid):
                kill(member, number)
            deadline = time.monotonic() + self.grace_s
            while time.monotonic() < deadline and session_members(self.pid):
                time.sleep(0.05)


P = TypeVar("P", bound=Process)
S = TypeVar("S", bound=LocalServer)


def identity(pid: int) -> dict[str, Any]:
    """The fields of `Process` for a process that runs."""
    return {"pid": pid, "started": start_time(pid) or 0, "scope": pid_scope()}


def start_server(
    command: Sequence[str],
    made: Callable[..., S],
    *,
    probe: Callable[[S], str | None],
    abandon: Callable[[S], None],
    name: str,
    state_file: Path,
    log_file: Path,
    cwd: Path,
    env: Mapping[str, str],
    timeout_s: float,
) -> S:
    """Start a server in a session of its own, which Ctrl-C does not reach, and return when it is ready: once `probe`
    returns None instead of the reason why it is not. stdout and stderr go to `log_file`, its state to `state_file`.

    `made` makes the server of the fields of `Process`. Raises ClusterError with the end of the log if the process ends,
    or is not ready within `timeout_s`. Whatever is raised meanwhile, `abandon` ends the server.
    """
    with log_file.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd=cwd,
            env=env,
        )
    server = made(**identity(process.pid))
    try:
        deadline = time.monotonic() + timeout_s
        while True:
            if process.poll() is not None:
                ended = f"{name} ended with code {process.returncode} while it started"
                raise ClusterError(f"{ended}{log_tail(str(log_file))}")
            if (reason := probe(server)) is None:
                break
            if time.monotonic() >= deadline:
                late = f"{name} did not come up within {timeout_s:.0f} s ({reason})"
                raise ClusterError(f"{late}{log_tail(str(log_file))}")
            time.sleep(_POLL_S)
        write_state(state_file, server)
    except BaseException:
        abandon(server)
        raise
    process.returncode = 0  # this process does not wait for its end
    return server


def write_state(path: Path, process: Process) -> None:
    write_private(path, json.dumps(asdict(process), indent=2) + "\n")


def read_state(path: Path, kind: type[P]) -> P | None:
    """The process that `write_state` wrote; None if there is no file, or one of another version."""
    try:
        return kind(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def alive(process: P | None) -> P | None:
    """The process if it runs, else None."""
    return process if process is not None and process.is_alive else None


def kill(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):  # it has ended; another user's process may have its pid
        os.kill(pid, number)


def session_members(session: int) -> list[int]:
    """Pids of the session's running processes."""
    members = []
    for folder in Path("/proc").glob("[0-9]*"):
        fields = _stat_fields(int(folder.name))
        if fields is not None and int(fields[3]) == session:
            members.append(int(folder.name))
    return members


def start_time(pid: int) -> int | None:
    """Clock ticks after boot at which `pid` started; None if it does not run, or is a zombie."""
    fields = _stat_fields(pid)
    return None if fields is None else int(fields[19])


def pid_scope() -> str:
    """The name of where pids and start times are valid: this boot, in this container's pid namespace."""
    return f"{boot_id()} {os.readlink('/proc/self/ns/pid')}"


def free_ports(count: int) -> list[int]:
    """Distinct ports on which nothing listens now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for s in sockets:
            s.bind((LOOPBACK, 0))
        return [int(s.getsockname()[1]) for s in sockets]


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds this address, and refuses connections until it listens. Raises OSError where it is taken."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except BaseException:
        bound.close()
        raise
    return bound


def check_port(host: str, port: int) -> None:
    """Raise OSError if nothing can listen at this address now."""
    bind(host, port).close()


def is_free(port: int) -> bool:
    try:
        check_port(LOOPBACK, port)
    except OSError:
        return False
    return True


def log_tail(log_file: str, num_lines: int = 15) -> str:
    """The end of a log, to append to an error message."""
    try:
        lines = Path(log_file).read_text(encoding="utf-8", errors="replace").strip().splitlines()
    except OSError:
        lines = []
    return f"; the end of {log_file}:\n" + "\n".join(f"  {line}" for line in lines[-num_lines:])


def _stat_fields(pid: int) -> list[str] | None:
    """Fields of /proc/PID/stat from the third on; None if `pid` has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if fields[0] == "Z" else fields
