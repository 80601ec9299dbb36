"""Names, versions and aliases of adapters, in SQLite or PostgreSQL."""

from loray.catalog.catalog import Catalog
from loray.catalog.entries import (
    DEFAULT_ALIAS,
    AdapterDetail,
    AdapterEntry,
    AdapterVersion,
    AliasMove,
    CatalogSnapshot,
    split_model,
)

__all__ = [
    "DEFAULT_ALIAS",
    "AdapterDetail",
    "AdapterEntry",
    "AdapterVersion",
    "AliasMove",
    "Catalog",
    "CatalogSnapshot",
    "split_model",
]
