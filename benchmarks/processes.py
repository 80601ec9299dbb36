"""Modules in processes of their own; the caller idles meanwhile."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def run(commands: Sequence[Sequence[str]], num_threads: int | None = None) -> list[dict[str, Any]]:
    """Modules with arguments, side by side, sharing `num_threads` (default: all cores). → what each prints last.

    Raises SystemExit where one of them fails, with what it said; the others are ended.
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
            worker.kill()  # where another one failed: it would wait for that one
            worker.wait()


def _result(worker: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = worker.communicate()
    if worker.returncode:
        raise SystemExit(f"a worker failed:\n{err[-2000:]}")
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found
