"""Starts the process under test."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.front.server import catalog_url

_END_S = 10.0


@contextmanager
def serving(
    kind: str, base: str, home: Path, interval_s: float, prepare: Callable[[str], None] = lambda url: None
) -> Iterator[tuple[int, int]]:
    """A server of engines that compute nothing; its port and process. `prepare` is called with its catalog's URL."""
    with tempfile.TemporaryDirectory(prefix="front-") as folder:
        prepare(catalog_url(Path(folder)))
        setup = {"kind": kind, "base": base, "home": str(home), "folder": folder, "interval_s": interval_s}
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.front.server", json.dumps(setup)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            assert process.stdout is not None
            if not (port := process.stdout.readline()):
                raise SystemExit("the server did not start; its error is above")
            yield int(port), process.pid
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()
