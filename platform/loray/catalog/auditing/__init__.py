"""The audit log as a chain of hashes."""

from loray.catalog.auditing.chain import add_entry, chained, log

__all__ = ["add_entry", "chained", "log"]
