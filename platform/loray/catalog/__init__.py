"""Names, versions and aliases of adapters, and training jobs, in SQLite or PostgreSQL."""

from loray.catalog.catalog import Catalog
from loray.catalog.entries import (
    AdapterDetail,
    AdapterEntry,
    AdapterVersion,
    AliasMove,
    AliasState,
    Canary,
    Job,
    Quarantined,
    VersionPage,
    VersionSummary,
    split_model,
)
from loray.catalog.identity import QuotaState, QuotaUse, UsageRow
from loray.catalog.jobs import JobPage
from loray.catalog.snapshots import CatalogSnapshot

__all__ = [
    "AdapterDetail",
    "AdapterEntry",
    "AdapterVersion",
    "AliasMove",
    "AliasState",
    "Canary",
    "Catalog",
    "CatalogSnapshot",
    "Job",
    "JobPage",
    "Quarantined",
    "QuotaState",
    "QuotaUse",
    "UsageRow",
    "VersionPage",
    "VersionSummary",
    "split_model",
]
