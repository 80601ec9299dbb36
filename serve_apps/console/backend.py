"""The services behind pages, and the sessions of browsers.

Of a session, the catalog keeps the cookie's SHA-256 and the key, sealed with the cookie: the key can be read with both
together alone, and every process of the API finds it.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable
from typing import Annotated, NamedTuple, Protocol

from fastapi import Depends, Request

from jobs.submission.tracker import JobTracker
from loray.catalog import Catalog
from loray.schemas.status import AdapterPlacement
from loray.scratch import Scratch
from loray.service import CatalogService
from loray.settings import Settings
from loray.spec import Principal
from loray.store import AdapterStore
from serve_apps.auth import Authenticator, CurrentPrincipal, RateLimits
from serve_apps.console.gateway import GatewayClient
from serve_apps.console.rendering import Renderer, Streams
from serve_apps.console.runs import Histories
from serve_apps.places import Places

COOKIE = "loray_session"


class Session(NamedTuple):
    """`key` is the API key, and None where the server needs none. `csrf` is what every change must repeat."""

    key: str | None
    csrf: str


class Sessions:
    """Begins, finds and ends sessions; safe from several threads. `catalog.identity.logins` says when one ends.

    Whether the key is still good is not decided here: each request is admitted with the key as if it had sent it.

    keyless  the session of every browser while the server needs no key
    """

    def __init__(self, catalog_of: Callable[[Principal], Catalog]) -> None:
        self.keyless = Session(None, secrets.token_urlsafe(32))
        self._catalog_of = catalog_of

    def begin(self, key: str, principal: Principal) -> str:
        """Begin a session, and return the value of its cookie. `principal` is the key's."""
        value = secrets.token_urlsafe(32)
        self._catalog_of(principal).logins.begin(_sha256(value), _sealed(value, key.encode()).hex())
        return value

    def find(self, value: str | None) -> Session | None:
        if value is None:
            return None
        sealed = self._catalog_of(Principal()).logins.find(_sha256(value))
        if sealed is None:
            return None
        return Session(_sealed(value, bytes.fromhex(sealed)).decode(), _derived(value, "csrf", 32).hex())

    def end(self, value: str | None, principal: Principal) -> None:
        if value is not None:
            self._catalog_of(principal).logins.end(_sha256(value))


def _sha256(value: str) -> str:
    return hashlib.sha256(value.encode("utf-8", "surrogateescape")).hexdigest()


def _sealed(value: str, key: bytes) -> bytes:
    """The key under a pad of its own length, which follows from the cookie, and is used for this key alone; of a sealed
    key, the key again.
    """
    return bytes(a ^ b for a, b in zip(key, _derived(value, "key", len(key)), strict=True))


def _derived(value: str, what: str, num_bytes: int) -> bytes:
    return hashlib.shake_256(f"loray {what}\0{value}".encode("utf-8", "surrogateescape")).digest(num_bytes)


class Placements(Protocol):
    async def adapters(self, digests: list[str]) -> list[AdapterPlacement]:
        """Say where these adapters are, from `EngineReplica.adapters` of every replica that answers."""


class Backend(Protocol):
    """The catalog API's services. As for the REST API, `service_of` and `jobs_of` decide what exists for a caller."""

    gateway: GatewayClient
    placements: Placements
    streams: Streams
    long: Places
    sending: Places
    downloads: Places
    rates: RateLimits
    scratch: Scratch

    @property
    def settings(self) -> Settings: ...

    @property
    def store(self) -> AdapterStore: ...

    def service_of(self, principal: Principal) -> CatalogService: ...

    def jobs_of(self, principal: Principal) -> JobTracker: ...


class Console(NamedTuple):
    """The console of one application, whose `app.state.console` it is.

    access     admits who logs in
    histories  what was read of jobs
    """

    backend: Backend
    access: Authenticator
    sessions: Sessions
    renderer: Renderer
    histories: Histories


async def _console(request: Request) -> Console:  # FastAPI would call a plain function in a thread
    console = request.app.state.console
    assert isinstance(console, Console)
    return console


ConsoleDep = Annotated[Console, Depends(_console)]


async def _service(console: ConsoleDep, asking: CurrentPrincipal) -> CatalogService:
    return console.backend.service_of(asking)


async def _jobs(console: ConsoleDep, asking: CurrentPrincipal) -> JobTracker:
    return console.backend.jobs_of(asking)


# As the request's caller may use them.
Service = Annotated[CatalogService, Depends(_service)]
Jobs = Annotated[JobTracker, Depends(_jobs)]
