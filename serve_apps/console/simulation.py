"""A deployment simulated while somebody waits, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from threading import Lock
from typing import NamedTuple

from loray.errors import LorayError, RateLimited, SpecError
from loray.simulation.asked import Asked, Line, Told
from serve_apps.console.runs import Curve

_TIMEOUT_S = 60.0
_PAUSES = 9.0  # times as long as its simulation took, before its account may have another one
_running = Lock()  # one at a time: it takes a core for seconds
_rests: dict[str, float] = {}  # until when, by the account; under `_running`


class Simulated(NamedTuple):
    """Curves by minute: the 99th percentile of the first token, and replicas; a line for each policy."""

    lines: tuple[Line, ...]
    num_requests: int
    profile: str
    first_token: Curve
    replicas: Curve


def simulated(asked: Asked, account: str | None) -> Simulated:
    """Raises SpecError for unknown policies and too many requests, RateLimited while another simulation runs, and where
    those of `account`, that of a key, would take more than a tenth of the time.
    """
    if not _running.acquire(blocking=False):
        raise RateLimited("another simulation runs; try again in a few seconds", retry_after_s=5.0)
    began = time.monotonic()
    try:
        _check_rested(account, began)
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
        if account is not None:
            now = time.monotonic()
            _rests[account] = max(_rests.get(account, now), now + _PAUSES * (now - began))
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


def _check_rested(account: str | None, now: float) -> None:
    for other, until in list(_rests.items()):
        if until <= now:
            del _rests[other]
    if account in _rests:
        left = _rests[account] - now
        raise RateLimited(f"this key's last simulation was just now; try again in {left:.0f} s", retry_after_s=left)
