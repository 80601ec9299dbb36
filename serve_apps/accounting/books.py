"""Where a gateway's usage events go, and the owner of its limits, while it runs."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial

from loray.catalog import Catalog
from loray.locations import FileLocation, parse_location
from loray.serving.quotas import QuotaGate
from loray.settings import Settings
from loray.spec import UsageEvent
from loray.store import open_store
from serve_apps.accounting.exchange import Exchange, follow_owner
from serve_apps.accounting.shared_owner import SharedOwner
from serve_apps.accounting.usage import UsageStatus, UsageWriter

_START_S = 2.0  # that a start waits to hear what was used before


class Books:
    """`exchange` None: the gateway is the only one, and has the owner of its limits in its process. `is_limited` is set
    while a key or a tenant has a limit; None: it may always be so.
    """

    def __init__(
        self, settings: Settings, exchange: Exchange | None = None, is_limited: asyncio.Event | None = None
    ) -> None:
        self._settings, self._exchange, self._is_limited = settings, exchange, is_limited
        self._writer: UsageWriter | None = None

    def _catalog(self) -> Catalog:
        return Catalog(self._settings.catalog)

    def add(self, event: UsageEvent) -> None:
        assert self._writer is not None, "requests end before the books are closed"
        self._writer.add(event)

    def note_open(self, event: UsageEvent) -> None:
        """As `UsageWriter.note_open`."""
        assert self._writer is not None, "requests begin after the books are opened"
        self._writer.note_open(event)

    @property
    def status(self) -> UsageStatus | None:
        """None before the books are opened."""
        return None if self._writer is None else self._writer.status

    @asynccontextmanager
    async def opened(self, gate: QuotaGate) -> AsyncIterator[None]:
        url = self._settings.store
        # A folder is on the disk that has the journal.
        open_objects = None if isinstance(parse_location(url), FileLocation) else partial(open_store, url)
        self._writer = UsageWriter(self._catalog, self._settings.home, self._settings.usage_days, open_objects)
        async with self._with_owner(gate) as exchange:
            task = asyncio.create_task(follow_owner(gate, exchange, self._is_limited))
            try:
                yield
            finally:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                await asyncio.to_thread(self._writer.close)

    @asynccontextmanager
    async def _with_owner(self, gate: QuotaGate) -> AsyncIterator[Exchange]:
        """The exchange with the owner of the limits. One of this process begins with what was used before, and is told
        at the end what the gate has admitted since its last exchange.
        """
        if self._exchange is not None:
            yield self._exchange
            return
        owner = SharedOwner(secrets.token_hex(8), 1, self._catalog)
        exchange = partial(owner.exchange, "gateway")
        with suppress(TimeoutError):
            async with asyncio.timeout(_START_S):
                gate.apply(await exchange(()), time.time())
        try:
            yield exchange
        finally:
            await exchange(gate.reports(time.time()))
            await owner.close()
