"""What the console's pages need of the application that serves them, and how they get it."""

from __future__ import annotations

import time
from typing import Annotated, NamedTuple, Protocol

from fastapi import Depends, Request

from jobs.submission.tracker import JobTracker
from loray.api.status import AdapterPlacement
from loray.api.uploads import Registration
from loray.catalog import AdapterVersion, Catalog
from loray.publishing import Destination
from loray.scratch import Scratch
from loray.settings import Settings
from loray.spec import Principal
from loray.store import AdapterStore
from serve_apps.access import Access, Asking
from serve_apps.access.places import Places
from serve_apps.access.rates import Rates
from serve_apps.console.live.gateway import Gateway
from serve_apps.console.live.histories import Histories
from serve_apps.console.live.streams import Streams
from serve_apps.console.rendering import Renderer
from serve_apps.console.sessions import Sessions


class Placements(Protocol):
    async def adapters(self, digests: list[str]) -> list[AdapterPlacement]:
        """Where these adapters are, from `EngineReplica.adapters` of every replica that answers."""


class Backend(Protocol):
    """The catalog API's services. What exists for a caller, `catalog_of` and `jobs_of` decide, as for the REST API."""

    gateway: Gateway
    placements: Placements
    streams: Streams
    long: Places
    sending: Places
    downloads: Places
    rates: Rates
    scratch: Scratch

    @property
    def settings(self) -> Settings: ...

    @property
    def store(self) -> AdapterStore: ...

    def catalog_of(self, principal: Principal) -> Catalog: ...

    def jobs_of(self, principal: Principal) -> JobTracker: ...

    def publish_upload(self, asked: Registration, to: Destination) -> AdapterVersion: ...


class Console(NamedTuple):
    """The console of one application, whose `app.state.console` it is.

    access     admits who logs in
    histories  what was read of jobs
    """

    backend: Backend
    access: Access
    sessions: Sessions
    renderer: Renderer
    histories: Histories


async def _console(request: Request) -> Console:  # FastAPI would call a plain function in a thread
    console = request.app.state.console
    assert isinstance(console, Console)
    return console


ConsoleDep = Annotated[Console, Depends(_console)]


async def _count_advice(console: ConsoleDep, asking: Asking) -> None:
    console.backend.rates.take_advice(asking, time.monotonic())


COUNTED_AS_ADVICE = [Depends(_count_advice)]  # of a route that plans or recommends: raises RateLimited
