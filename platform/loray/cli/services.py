"""What commands work on, as the environment names it: settings, store and catalog, or the API of a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from loray.catalog import Catalog
from loray.client import CatalogClient
from loray.errors import SettingsError
from loray.settings import Settings
from loray.store import AdapterStore, open_store

_TRANSFER_RETRY_S = 60.0


class Services(NamedTuple):
    settings: Settings
    store: AdapterStore
    catalog: Catalog


@contextmanager
def open_services() -> Iterator[Services]:
    settings = Settings.from_env()
    catalog = Catalog.of(settings)
    try:
        yield Services(settings, AdapterStore(open_store(settings.store)), catalog)
    finally:
        catalog.close()


@contextmanager
def open_remote(*, retry_s: float = 0.0) -> Iterator[CatalogClient | None]:
    """A client of the server at LORAY_URL; None where commands work on store and catalog themselves.

    `retry_s`: how long it waits for a server that is away.
    """
    settings = Settings.from_env()
    if settings.url is None:
        yield None
        return
    with CatalogClient(settings.url, retry_s=retry_s) as client:
        yield client


@contextmanager
def open_catalog() -> Iterator[CatalogClient | Catalog]:
    """A client of the server at LORAY_URL, else the catalog itself: for calls that both have."""
    with open_remote() as client:
        if client is not None:
            yield client
        else:
            with open_services() as services:
                yield services.catalog


@contextmanager
def needed_remote() -> Iterator[CatalogClient]:
    """As `open_remote`; transfers go on when the server comes back. Raises SettingsError without LORAY_URL."""
    with open_remote(retry_s=_TRANSFER_RETRY_S) as client:
        if client is None:
            raise SettingsError("this asks a server: set LORAY_URL to its address, as http://127.0.0.1:8000")
        yield client
