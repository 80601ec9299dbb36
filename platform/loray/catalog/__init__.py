"""Names, versions and aliases of adapters, and training jobs, in SQLite or PostgreSQL."""

from loray.catalog.adapters import Registration
from loray.catalog.catalog import Catalog
from loray.catalog.entries import (
    AdapterEntry,
    AdapterVersion,
    AliasMove,
    Canary,
    Job,
    Quarantined,
    VersionSummary,
    split_model,
)
from loray.catalog.quotas import QuotaState, QuotaUse
from loray.catalog.snapshot import CatalogSnapshot

__all__ = [
    "AdapterEntry",
    "AdapterVersion",
    "AliasMove",
    "Canary",
    "Catalog",
    "CatalogSnapshot",
    "Job",
    "Quarantined",
    "QuotaState",
    "QuotaUse",
    "Registration",
    "VersionSummary",
    "split_model",
]
