"""Names, versions and aliases of adapters, and training jobs, in SQLite or PostgreSQL."""

from loray.catalog.catalog import Catalog
from loray.catalog.entries import (
    AdapterDetail,
    AdapterEntry,
    AdapterVersion,
    AliasMove,
    AliasState,
    Job,
    split_model,
)
from loray.catalog.jobs import JobPage
from loray.catalog.snapshots import CatalogSnapshot
from loray.catalog.usage import UsageRow

__all__ = [
    "AdapterDetail",
    "AdapterEntry",
    "AdapterVersion",
    "AliasMove",
    "AliasState",
    "Catalog",
    "CatalogSnapshot",
    "Job",
    "JobPage",
    "UsageRow",
    "split_model",
]
