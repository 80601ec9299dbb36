"""When a request is sent again: the server could not be reached, broke off, or said 503."""

from __future__ import annotations

import random
import time

import httpx

NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
BROKEN = (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError, httpx.ProxyError)
PASSING = frozenset({502, 503, 504})
RATE_LIMITED = 429  # nothing was done

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.25, 5.0


class Patience:
    """The attempts at one request, for up to `seconds` after the first. The pauses grow, and differ between clients, so
    that they do not all come at the moment when the server is back.
    """

    def __init__(self, seconds: float) -> None:
        self._ends_at = time.monotonic() + seconds
        self._pause_s = _FIRST_PAUSE_S

    def wait(self, retry_after: str | None = None) -> bool:
        """Wait before the next attempt, at least as long as the header Retry-After says. False: the time is over."""
        pause_s = self._pause_s * random.uniform(0.5, 1.0)
        if retry_after is not None and retry_after.isdigit():
            pause_s += float(retry_after)
        if time.monotonic() + pause_s > self._ends_at:
            return False
        time.sleep(pause_s)
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return True
