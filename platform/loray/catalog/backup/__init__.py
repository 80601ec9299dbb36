"""Backups of the catalog: all its rows in one file, which an empty catalog on either kind of database takes."""

from loray.catalog.backup.backups import Backups
from loray.catalog.backup.lines import BackupSummary

__all__ = ["BackupSummary", "Backups"]
