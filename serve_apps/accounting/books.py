"""Where a gateway's usage events go, and with whom it shares limits, while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from loray.catalog import Catalog
from loray.locations import FileLocation, parse_location
from loray.serving.quotas import QuotaGate
from loray.settings import Settings
from loray.spec import UsageEvent
from loray.store import open_store
from serve_apps.accounting.exchange import Exchange, UsedBefore, follow_owner, follow_usage
from serve_apps.accounting.usage import UsageStatus, UsageWriter


class Books:
    """`exchange` None: the gateway is the only one. `is_limited` is set while a key or a tenant has a limit; None: it
    may always be so.
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
    async def opened(self, gate: QuotaGate, woken: asyncio.Event) -> AsyncIterator[None]:
        """`woken` is set when the gate has a new budget."""
        url = self._settings.store
        # A folder is on the disk that has the journal.
        open_objects = None if isinstance(parse_location(url), FileLocation) else partial(open_store, url)
        self._writer = UsageWriter(self._catalog, self._settings.home, self._settings.usage_days, open_objects)
        used_before = UsedBefore(self._catalog)
        if self._exchange is None:
            task = asyncio.create_task(follow_usage(gate, used_before, woken))
        else:
            task = asyncio.create_task(follow_owner(gate, self._exchange, self._is_limited))
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await asyncio.to_thread(self._writer.close)
            used_before.close()
