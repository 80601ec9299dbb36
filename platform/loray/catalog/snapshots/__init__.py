"""Many names at once: all in memory, how they follow the catalog's changes, their copy on disk; pages of them."""

from loray.catalog.snapshots.snapshot import BaseTotals, CatalogSnapshot, Changes

__all__ = ["BaseTotals", "CatalogSnapshot", "Changes"]
