"""`loray serve` in a process of its own, on a tiny random base, for tests of the server."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.settings import Settings
from loray.spec import ServeSpec
from loray.store import AdapterStore, open_store
from tests.cluster import SERVE, Served, free_port, served_base

_MAIN = """
import sys
from loray.cli.main import main
try:
    main()
finally:
    print("modules of Ray:", [m for m in sys.modules if m.split(".")[0] == "ray"], flush=True)
"""
_TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Standalone:
    """`log`: what the process has written to stdout and stderr."""

    served: Served
    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def end(self) -> int:
        """Ends it with SIGTERM, and returns its exit code."""
        self.process.terminate()
        return self.process.wait(_TIMEOUT_S)


@contextmanager
def standalone(
    folder: Path, *args: str, base: BaseModel | None = None, main: str = _MAIN, **fields: Any
) -> Iterator[Standalone]:
    """Runs `loray serve` with ServeSpec's `fields` and LORAY_HOME in `folder`, and waits until it answers.

    `base`: one of another home; else a tiny one is made. `main`: the program, which calls the command.
    """
    home = folder / "home"
    if base is None:
        base = served_base(folder / "checkpoint", home)
    else:
        home.mkdir()
        (home / "bases").symlink_to(base.path.parent)
    spec = ServeSpec(base=base.name, port=free_port(), **{"dtype": "float32"} | SERVE | fields)
    spec_file = folder / "spec.yaml"
    spec_file.write_text(yaml.safe_dump(spec.model_dump(mode="json", exclude_none=True, exclude={"base"})))
    env = {k: v for k, v in os.environ.items() if not k.startswith("LORAY_")} | {"LORAY_HOME": str(home)}
    command = [sys.executable, "-W", "error", "-c", main, "serve", base.name, "--spec", str(spec_file), *args]
    log_file = folder / "serve.log"
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=env, cwd=folder, process_group=0)
    try:
        url = f"http://{spec.host}:{spec.port}"
        _wait(process, url, log_file)
        settings = Settings.from_env({"LORAY_HOME": str(home)})
        store, catalog = AdapterStore(open_store(settings.store)), Catalog(settings.catalog)
        yield Standalone(Served(url, base, store, catalog, settings, spec), process, log_file)
        catalog.close()
    finally:
        process.kill()
        process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log_file: Path) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        assert process.poll() is None, log_file.read_text()
        try:
            assert httpx.get(f"{url}/health", timeout=30).status_code == 200
            return
        except httpx.ConnectError:
            assert time.monotonic() < deadline, log_file.read_text()
            time.sleep(0.05)


@pytest.fixture(scope="session")
def served_alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """As `served`, without Ray."""
    with standalone(tmp_path_factory.mktemp("standalone")) as server:
        yield server.served
