"""Modules run in separate processes, which print their results as JSON; the caller only waits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def run(commands: Sequence[Sequence[str]], num_threads: int | None = None) -> list[dict[str, Any]]:
    """Run modules with their arguments side by side; returns the JSON object that each prints last.

    The processes share `num_threads` (default: all cores). If one fails, the others are killed and SystemExit carries
    the end of its stderr.
    """
    threads = max(1, (num_threads or os.cpu_count() or 1) // len(commands))
    env = os.environ | {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}
    pipe = subprocess.PIPE
    workers = [
        subprocess.Popen([sys.executable, "-m", *command], env=env, stdout=pipe, stderr=pipe, text=True)
        for command in commands
    ]
    try:
        return [_result(worker) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()  # after a failure the other ranks would wait for the failed one
            worker.wait()


def _result(worker: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = worker.communicate()
    if worker.returncode:
        raise SystemExit(f"a worker failed:\n{err[-2000:]}")
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found
