"""What the test kills and starts again: PostgreSQL, the S3 server, the API, and publishers."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from loray.local.processes import free_ports, is_free, kill, session_members
from loray.local.s3 import LocalS3, start_local_s3
from loray.locations import S3Location, parse_location
from loray.store.s3 import _PROBE, connect
from tests.serve_apps.kills.publisher import Options, arguments


class Mortal(Protocol):
    def kill(self) -> None: ...

    def start(self) -> None: ...


class Child:
    """A process of this test."""

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str]) -> None:
        self._command, self._log = command, log
        self._env = {k: v for k, v in os.environ.items() if not k.startswith("LORAY_")} | env
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, env=self._env)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def runs(self) -> bool:
        """AssertionError where it has failed."""
        assert self.process.poll() in (None, 0), self._log.read_text()[-5000:]
        return self.process.returncode is None


class ApiProcess(Child):
    """The catalog's API. It does not wait for database and store."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        self.access_log, self.scratch = folder / "access.jsonl", folder / "scratch"
        self.scratch.mkdir()
        mine = {"LORAY_ACCESS_LOG": str(self.access_log), "LORAY_LOG_LEVEL": "WARNING", "TMPDIR": str(self.scratch)}
        command = [sys.executable, "-m", "tests.serve_apps.kills.server", str(port)]
        super().__init__(command, folder / "api.log", mine | env)

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(60) in (0, -signal.SIGTERM)


class Publisher(Child):
    def __init__(self, options: Options, folder: Path) -> None:
        scratch = folder / "publishers"
        scratch.mkdir(exist_ok=True)
        env = {"LORAY_URL": options.url, "LORAY_LOG_LEVEL": "WARNING", "TMPDIR": str(scratch)}
        super().__init__(arguments(options), folder / f"publisher-{options.first}.log", env)


class Bucket:
    """The S3 server, and one bucket of it."""

    def __init__(self, server: LocalS3, url: str) -> None:
        self._server, self.url = server, url

    @property
    def pid(self) -> int:
        return self._server.pid

    def kill(self) -> None:
        for pid in session_members(self._server.pid):
            kill(pid, signal.SIGKILL)
        while session_members(self._server.pid):
            time.sleep(0.01)

    def start(self) -> None:
        while not all(is_free(port) for port in self._server.ports.values()):
            time.sleep(0.05)  # another process has one for a moment, maybe for a connection
        before, self._server = self._server, start_local_s3(Path(self._server.folder))
        assert self._server.ports == before.ports

    def keys(self) -> set[str]:
        """Of all objects, but the one by which writers probe the server."""
        location = parse_location(self.url)
        assert isinstance(location, S3Location)
        pages = connect(location).get_paginator("list_objects_v2").paginate(Bucket=location.bucket)
        return {item["Key"] for page in pages for item in page.get("Contents", ())} - {_PROBE}


class Killer:
    """Kills what it is told, and starts it again a moment later. `all`: everything at once."""

    def __init__(self, parts: Mapping[str, Mortal], publishers: Sequence[Publisher], chance: random.Random) -> None:
        self._parts, self._publishers, self._chance = parts, publishers, chance

    def strike(self, what: str) -> None:
        victims: list[Mortal] = list(self._parts.values()) if what == "all" else []
        if what in self._parts:
            victims = [self._parts[what]]
        running: list[Mortal] = [p for p in self._publishers if p.runs]
        if what == "all":
            victims += running
        elif what == "publisher" and running:
            victims = [self._chance.choice(running)]
        self._chance.shuffle(victims)
        for victim in victims:
            victim.kill()
        if what != "publisher":
            time.sleep(self._chance.uniform(0, 1.5))  # the others notice
        self._chance.shuffle(victims)
        for victim in victims:
            victim.start()


def schedule(chance: random.Random, rounds: int) -> list[str]:
    """What is killed, in this order."""
    kills = (["publisher"] * 5 + ["api"] * 3 + ["database"] * 2 + ["store"] * 2 + ["all"]) * rounds
    chance.shuffle(kills)
    return kills


def database_of(url: str) -> str:
    return url.rpartition("/")[2]
