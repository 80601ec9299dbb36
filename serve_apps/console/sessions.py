"""Sessions of browsers: a cookie names one, and the key that was given at the login stays in this process."""

from __future__ import annotations

import hashlib
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field

COOKIE = "loray_session"
IDLE_S = 12 * 3600.0
MOST = 1000  # the one that was not used for longest makes room


@dataclass(slots=True)
class Session:
    """`key` is the API key, and None where the server needs none. `csrf` is what every change must repeat."""

    key: str | None
    csrf: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    used_at: float = 0.0


class Sessions:
    """Used from one event loop. A session ends at logout, after `IDLE_S` without a request, and with its process.

    Whether the key is still good is not decided here: each request is admitted with the key as if it had sent it.

    keyless  the session of every browser while the server needs no key
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.keyless = Session(None)
        self._clock = clock
        self._by_digest: dict[bytes, Session] = {}  # in the order of use

    def begin(self, key: str) -> str:
        """Returns the cookie's value, of which only the SHA-256 is kept."""
        if len(self._by_digest) >= MOST:
            self._by_digest.pop(next(iter(self._by_digest)))
        value = secrets.token_urlsafe(32)
        self._by_digest[_digest(value)] = Session(key, used_at=self._clock())
        return value

    def find(self, value: str | None) -> Session | None:
        if value is None:
            return None
        digest, now = _digest(value), self._clock()
        session = self._by_digest.pop(digest, None)
        if session is None or now - session.used_at > IDLE_S:
            return None
        session.used_at = now
        self._by_digest[digest] = session
        return session

    def end(self, value: str | None) -> None:
        if value is not None:
            self._by_digest.pop(_digest(value), None)


def _digest(value: str) -> bytes:
    return hashlib.sha256(value.encode("utf-8", "surrogateescape")).digest()
