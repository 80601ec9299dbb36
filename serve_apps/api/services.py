"""The services behind the routes: the catalog, the store, Ray's job server, and the engine's replicas."""

from __future__ import annotations

import time
from pathlib import Path as FilePath
from threading import Lock
from typing import Annotated, Protocol

from fastapi import Path, Query

from jobs.submission.tracker import JobServer, JobTracker
from loray.api.status import AdapterPlacement
from loray.catalog import Catalog
from loray.errors import CatalogError, LorayError
from loray.settings import Settings
from loray.spec import Alias, Name
from loray.store import AdapterStore, open_store

ACTOR = "api"
_RETRY_S = 1.0  # between two attempts to open the catalog, as in the header Retry-After

NamePath = Annotated[Name, Path(description="Name of an adapter")]
AliasPath = Annotated[Alias, Path(description="`prod`, `canary`, …")]
Limit = Annotated[int, Query(ge=1, le=1000, description="items of a page")]


class Placements(Protocol):
    async def adapters(self, digests: list[str]) -> list[AdapterPlacement]:
        """Where these adapters are, from `EngineReplica.adapters` of every replica that answers."""


class Services:
    """Opens each service on first use, so that the server starts without its database, and answers 503."""

    def __init__(self, settings: Settings, jobs: JobServer, placements: Placements) -> None:
        self.placements = placements
        self.jobs = JobTracker(lambda: self.catalog, jobs, settings)
        self._settings = settings
        self._catalog_lock, self._store_lock = Lock(), Lock()
        self._catalog: Catalog | None = None
        self._failure, self._failed_at = "", float("-inf")
        self._store: AdapterStore | None = None

    @property
    def home(self) -> FilePath:
        """The folder that contains this node's bases."""
        return self._settings.home

    @property
    def catalog(self) -> Catalog:
        """The catalog. Raises CatalogError. Concurrent requests share one attempt to open it, which may take long."""
        with self._catalog_lock:
            if self._catalog is None:
                if time.monotonic() - self._failed_at < _RETRY_S:
                    raise CatalogError(self._failure)
                try:
                    self._catalog = Catalog(
                        self._settings.catalog, actor=ACTOR, gate_tolerance=self._settings.gate_tolerance
                    )
                except LorayError as e:
                    self._failure = str(e) if isinstance(e, CatalogError) else f"the catalog cannot be opened: {e}"
                    self._failed_at = time.monotonic()
                    raise CatalogError(self._failure) from e
            return self._catalog

    @property
    def store(self) -> AdapterStore:
        with self._store_lock:
            if self._store is None:
                self._store = AdapterStore(open_store(self._settings.store))
            return self._store

    def close(self) -> None:
        if self._catalog is not None:
            self._catalog.close()
