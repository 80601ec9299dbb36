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
from loray.catalog.jobs import JobPage
from loray.catalog.quotas import QuotaState, QuotaUse
from loray.catalog.snapshot import CatalogSnapshot
from loray.catalog.usage import UsageRow

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
