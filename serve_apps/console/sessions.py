"""Sessions of browsers: a cookie names one, and opens the key that was given at the login.

The catalog keeps the cookie's SHA-256 and the key, sealed with the cookie: it can be read with both together alone, and
every process of the API finds it.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from typing import NamedTuple

from loray.catalog import Catalog
from loray.spec import Principal

COOKIE = "loray_session"


class Session(NamedTuple):
    """`key` is the API key, and None where the server needs none. `csrf` is what every change must repeat."""

    key: str | None
    csrf: str


class Sessions:
    """Safe from several threads, and waits for the database. When a session ends, `catalog.identity.logins` says.

    Whether the key is still good is not decided here: each request is admitted with the key as if it had sent it.

    keyless  the session of every browser while the server needs no key
    """

    def __init__(self, catalog_of: Callable[[Principal], Catalog]) -> None:
        self.keyless = Session(None, secrets.token_urlsafe(32))
        self._catalog_of = catalog_of

    def begin(self, key: str, principal: Principal) -> str:
        """The new cookie's value. `principal` is the key's."""
        value = secrets.token_urlsafe(32)
        self._catalog_of(principal).begin_login(_sha256(value), _sealed(value, key.encode()).hex())
        return value

    def find(self, value: str | None) -> Session | None:
        if value is None:
            return None
        sealed = self._catalog_of(Principal()).find_login(_sha256(value))
        if sealed is None:
            return None
        return Session(_sealed(value, bytes.fromhex(sealed)).decode(), _derived(value, "csrf", 32).hex())

    def end(self, value: str | None, principal: Principal) -> None:
        if value is not None:
            self._catalog_of(principal).end_login(_sha256(value))


def _sha256(value: str) -> str:
    return hashlib.sha256(value.encode("utf-8", "surrogateescape")).hexdigest()


def _sealed(value: str, key: bytes) -> bytes:
    """The key under a pad of its own length, which follows from the cookie, and is used for this key alone; of a sealed
    key, the key again.
    """
    return bytes(a ^ b for a, b in zip(key, _derived(value, "key", len(key)), strict=True))


def _derived(value: str, what: str, num_bytes: int) -> bytes:
    return hashlib.shake_256(f"loray {what}\0{value}".encode("utf-8", "surrogateescape")).digest(num_bytes)
