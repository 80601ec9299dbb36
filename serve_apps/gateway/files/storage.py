"""Catalog and store behind the routes of files and batches, opened on first use: a gateway starts without them."""

from __future__ import annotations

import time
from collections.abc import Callable
from threading import Lock
from typing import TypeVar

from loray.catalog import Catalog
from loray.settings import Settings
from loray.spec import Principal
from loray.store import open_store
from loray.store.objects import ObjectStore
from serve_apps.auth import RateLimits
from serve_apps.places import MostPlaces, Places

T = TypeVar("T")

ACTOR = "gateway"  # of requests without a key
_ASKING = MostPlaces(total=8, of_tenant=4, wait_s=10.0)  # of the catalog, for milliseconds
_SENDING = MostPlaces(total=8, of_tenant=2, wait_s=10.0)  # each holds two parts of a file
_DOWNLOADS = MostPlaces(total=16, of_tenant=4, wait_s=10.0)


class FileStorage:
    """What the routes of a gateway need, whose work is done in threads of their own. Used from one event loop.

    uploads, downloads  how many files are received and sent at once
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._opening = Lock()
        self._catalog: Catalog | None = None
        self._store: ObjectStore | None = None
        self._asking = Places("requests for files", _ASKING)
        self.uploads, self.downloads = Places("uploads of files", _SENDING), Places("downloads of files", _DOWNLOADS)
        self._rates = RateLimits()

    def catalog_of(self, principal: Principal) -> Catalog:
        """View the catalog as this caller sees it. Raises CatalogError."""
        with self._opening:
            if self._catalog is None:
                self._catalog = Catalog.of(self._settings, ACTOR)
        if principal.key_id is None:
            principal = principal.model_copy(update={"actor": ACTOR})
        return self._catalog.view(principal)

    @property
    def store(self) -> ObjectStore:
        with self._opening:
            if self._store is None:
                self._store = open_store(self._settings.store)
            return self._store

    async def ask(self, principal: Principal, question: Callable[[Catalog], T]) -> T:
        """Ask the catalog as this caller. Raises what it raises, and RateLimited as `count` does."""
        self.count(principal)
        return await self._asking.run(principal.tenant, lambda: question(self.catalog_of(principal)))

    def count(self, principal: Principal) -> None:
        """Count a request. Raises RateLimited for one who asks too often."""
        self._rates.take(principal, time.monotonic())

    async def run(self, principal: Principal, work: Callable[[], T]) -> T:
        """Do a part of a longer work in a thread."""
        return await self._asking.run(principal.tenant, work)

    def close(self) -> None:
        for places in (self._asking, self.uploads, self.downloads):
            places.close()
        if self._catalog is not None:
            self._catalog.close()
