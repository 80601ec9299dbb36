"""What commands work on: settings, store and catalog, as the environment names them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from loray.catalog import Catalog
from loray.settings import Settings
from loray.store import AdapterStore, open_store


class Services(NamedTuple):
    settings: Settings
    store: AdapterStore
    catalog: Catalog


@contextmanager
def open_services() -> Iterator[Services]:
    settings = Settings.from_env()
    catalog = Catalog(settings.catalog, gate_tolerance=settings.gate_tolerance)
    try:
        yield Services(settings, AdapterStore(open_store(settings.store)), catalog)
    finally:
        catalog.close()
