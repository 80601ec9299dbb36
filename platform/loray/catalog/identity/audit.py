"""The audit log: what was written, by whom, on whose data. Entries are added by the operations that write."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa

from loray.catalog.database import Database, reading
from loray.catalog.queries import utc
from loray.catalog.schema import audit_log


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One write. `subject` is what was written, `tenant` whose it is, `detail` what was given."""

    id: int
    actor: str
    action: str
    subject: str
    tenant: str
    detail: Mapping[str, Any]
    created_at: datetime


class AuditPage(NamedTuple):
    """`entries` newest first; `next` is the cursor of the next page, None at the end."""

    entries: tuple[AuditEntry, ...]
    next: int | None


class Audit(Database):
    """The catalog's reading of the audit log."""

    def audit(
        self,
        *,
        limit: int = 100,
        cursor: int | None = None,
        tenant: str | None = None,
        actor: str | None = None,
        action: str | None = None,
        subject: str | None = None,
        since: datetime | None = None,
    ) -> AuditPage:
        """At most `limit` entries, newest first, after `cursor`, the `next` of a page. None: not filtered."""
        query = sa.select(audit_log).order_by(audit_log.c.id.desc()).limit(limit + 1)
        wanted = {"tenant": tenant, "actor": actor, "action": action, "subject": subject}
        query = query.where(*(audit_log.c[name] == value for name, value in wanted.items() if value is not None))
        if since is not None:
            query = query.where(audit_log.c.created_at >= since)
        if cursor is not None:
            query = query.where(audit_log.c.id < cursor)
        with reading(self._engine) as c:
            found = [_entry(row) for row in c.execute(query)]
        page = tuple(found[:limit])
        return AuditPage(page, page[-1].id if len(found) > limit else None)


def _entry(row: sa.Row[Any]) -> AuditEntry:
    fields = row._asdict()
    return AuditEntry(**fields | {"detail": json.loads(row.detail), "created_at": utc(row.created_at)})
