"""Processes that tests kill and start again: the catalog's API, and publishers.

    python -m tests.faults.processes server PORT
    python -m tests.faults.processes publisher OPTIONS

A publisher pushes its share as a user would: who is told that the server does not answer gives the same command again.
What has been acknowledged it notes in a file, and leaves out when it is started again.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from loray.cli.main import cli
from loray.client import CatalogClient
from loray.errors import CatalogError, ClusterError, StoreError
from loray.local.processes import LOOPBACK, free_ports
from loray.schemas.resources import VersionDetail
from loray.settings import Settings
from loray.telemetry import configure_logging
from tests.fixtures.publisher import write_adapter

T = TypeVar("T")
NUM_NAMES = 20


class Child:
    """This module as a process, with these arguments."""

    def __init__(self, *arguments: str, log: Path, env: Mapping[str, str]) -> None:
        self._command, self._log = [sys.executable, "-m", "tests.faults.processes", *arguments], log
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("LORAY_")}
        self._env = inherited | {"LORAY_LOG_LEVEL": "WARNING", **env}
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
    """It does not wait for database and store."""

    def __init__(self, folder: Path, env: Mapping[str, str]) -> None:
        (port,) = free_ports(1)
        self.url = f"http://{LOOPBACK}:{port}"
        self.access_log, self.scratch = folder / "access.jsonl", folder / "scratch"
        self.scratch.mkdir()
        mine = {"LORAY_ACCESS_LOG": str(self.access_log), "TMPDIR": str(self.scratch)}
        super().__init__("server", str(port), log=folder / "api.log", env=mine | env)

    def stop(self) -> None:
        self.process.terminate()
        assert self.process.wait(60) in (0, -signal.SIGTERM)


@dataclass(frozen=True)
class Options:
    """Publication `number` of `count` is of the publisher number % step == first."""

    first: int
    step: int
    count: int
    url: str
    base: str
    template: str
    folder: str

    @property
    def note(self) -> Path:
        """What has been acknowledged."""
        return Path(self.folder) / f"acknowledged-{self.first}"


class Publisher(Child):
    def __init__(self, options: Options) -> None:
        folder = Path(options.folder)
        scratch = folder / "publishers"
        scratch.mkdir(exist_ok=True)
        env = {"LORAY_URL": options.url, "TMPDIR": str(scratch)}
        log = folder / f"publisher-{options.first}.log"
        super().__init__("publisher", json.dumps(asdict(options)), log=log, env=env)


class Acknowledged(NamedTuple):
    number: int
    name: str
    version: int
    digest: str


def acknowledged_in(folder: Path) -> list[Acknowledged]:
    lines = [line for note in sorted(folder.glob("acknowledged-*")) for line in note.read_text().splitlines(True)]
    return [Acknowledged(*json.loads(line)) for line in lines if line.endswith("\n")]


def publish(options: Options) -> None:
    note = os.open(options.note, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    done = {each.number for each in acknowledged_in(Path(options.folder))}
    _again(lambda: _abandon(options))
    for number in range(options.first, options.count, options.step):
        if number in done:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "adapter"
            write_adapter(Path(options.template), folder, number)
            version = _again(lambda folder=folder, number=number: _push(folder, number, options.base))  # type: ignore[misc]
        acknowledged = Acknowledged(number, version.name, version.version, version.digest)
        os.write(note, json.dumps(acknowledged).encode() + b"\n")


def _again(call: Callable[[], T]) -> T:
    while True:
        try:
            return call()
        except (CatalogError, ClusterError, StoreError) as e:
            print(f"again after: {e}", file=sys.stderr, flush=True)


def _push(folder: Path, number: int, base: str) -> VersionDetail:
    command = ["adapters", "push", str(folder), "--name", f"a{number % NUM_NAMES}", "--base", base]
    with redirect_stdout(io.StringIO()) as printed:
        cli.main([*command, "--alias", "prod", "--json"], standalone_mode=False)
    return VersionDetail.model_validate_json(printed.getvalue())


def _abandon(options: Options) -> None:
    """Begins an upload that nobody ends."""
    with CatalogClient(options.url, retry_s=60) as client:
        upload = client.begin_upload(f"abandoned by {options.first}")
        client.put_file(upload.id, Path(options.template) / "adapter_config.json")


def serve(port: int) -> None:
    import uvicorn

    from serve_apps.accounting.access_log import log_access
    from serve_apps.api.services import Services
    from serve_apps.api.site import create_app
    from serve_apps.auth import open_auth
    from tests.fixtures.api import FakeJobs, FakePlacements, mounted

    settings = Settings.from_env()
    configure_logging(settings.log_level)
    api = create_app(Services(settings, FakeJobs(), FakePlacements()), open_auth(settings, LOOPBACK))
    app = mounted(log_access(api, settings.access_log))
    uvicorn.run(app, host=LOOPBACK, port=port, log_level="warning", timeout_graceful_shutdown=30)


if __name__ == "__main__":
    if sys.argv[1] == "server":
        serve(int(sys.argv[2]))
    else:
        publish(Options(**json.loads(sys.argv[2])))
