"""What the routes work on: the catalog, the store, Ray's job server, and the engine's replicas."""

from __future__ import annotations

from threading import Lock
from typing import Annotated, Any, Protocol

from fastapi import Path, Query

from loray.catalog import Catalog
from loray.errors import CatalogError, LorayError
from loray.settings import Settings
from loray.spec import Alias, Name
from loray.store import AdapterStore, open_store
from serve_apps.api.training import JobServer, Training

ACTOR = "api"

NamePath = Annotated[Name, Path(description="Name of an adapter")]
AliasPath = Annotated[Alias, Path(description="`prod`, `canary`, …")]
Limit = Annotated[int, Query(ge=1, le=1000, description="items of a page")]


class Placements(Protocol):
    async def adapters(self, digests: list[str]) -> list[dict[str, Any]]:
        """Of each replica that answers, what `EngineReplica.adapters` says of these; nothing where none is served."""


class Site:
    """Opened at the first use that succeeds, so that the server comes up, and answers 503, without its database."""

    def __init__(self, settings: Settings, jobs: JobServer, placements: Placements) -> None:
        self.placements = placements
        self.training = Training(lambda: self.catalog, jobs, settings)
        self._settings = settings
        self._lock = Lock()
        self._catalog: Catalog | None = None
        self._store: AdapterStore | None = None

    @property
    def catalog(self) -> Catalog:
        """Raises CatalogError."""
        with self._lock:
            if self._catalog is None:
                try:
                    self._catalog = Catalog(self._settings.catalog, actor=ACTOR)
                except CatalogError:
                    raise
                except LorayError as e:
                    raise CatalogError(f"the catalog cannot be opened: {e}") from e
            return self._catalog

    @property
    def store(self) -> AdapterStore:
        with self._lock:
            if self._store is None:
                self._store = AdapterStore(open_store(self._settings.store))
            return self._store

    def close(self) -> None:
        if self._catalog is not None:
            self._catalog.close()
