"""A deployment simulated while somebody waits, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from threading import Lock
from typing import NamedTuple

from loray.errors import LorayError, RateLimited, SpecError
from loray.simulation.asked import Asked, Line, Told
from serve_apps.console.live.series import Curve

_TIMEOUT_S = 60.0
_running = Lock()  # one at a time: it takes a core for seconds


class Simulated(NamedTuple):
    """Curves by minute: the 99th percentile of the first token, and replicas; a line for each policy."""

    lines: tuple[Line, ...]
    num_requests: int
    profile: str
    first_token: Curve
    replicas: Curve


def simulated(asked: Asked) -> Simulated:
    """Raises SpecError for unknown policies and too many requests, RateLimited while another simulation runs."""
    if not _running.acquire(blocking=False):
        raise RateLimited("another simulation runs; try again in a few seconds", retry_after_s=5.0)
    try:
        made = subprocess.run(
            [sys.executable, "-P", "-m", "loray.simulation"],
            input=asked.model_dump_json(),
            capture_output=True,
            text=True,
            check=False,
            timeout=_TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise SpecError("it took more than a minute; ask for less, or `loray simulate`") from None
    finally:
        _running.release()
    if made.returncode == 2:
        raise SpecError(made.stderr.strip())
    if made.returncode:
        raise LorayError(f"the simulation failed: {made.stderr.strip()[-500:]}")
    told = Told.model_validate_json(made.stdout)
    labels = json.dumps(["minute", *(line.policy for line in told.lines)])
    return Simulated(
        told.lines,
        told.num_requests,
        told.profile,
        Curve(labels, json.dumps([told.minutes, *(line.p99_s for line in told.lines)])),
        Curve(labels, json.dumps([told.minutes, *(line.replicas for line in told.lines)])),
    )
