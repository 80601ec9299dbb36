"""The audit log: what was written, taken and refused, by whom, on whose data. Operations that write add entries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import sqlalchemy as sa

from loray.catalog.audit_chain import Origin, add_entry, chained
from loray.catalog.database import Database, reading, writing
from loray.catalog.queries import lock, log, utc
from loray.catalog.schema import audit_log
from loray.errors import IntegrityError


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One thing that was done. `subject` is what it was done to, `tenant` whose that is, `detail` what was given,
    `address` from where the request came, as far as the server knows, and `request_id` the answer's X-Request-Id.
    """

    id: int
    actor: str
    action: str
    subject: str
    tenant: str
    detail: Mapping[str, Any]
    created_at: datetime
    address: str | None = None
    request_id: str | None = None


class AuditPage(NamedTuple):
    """`entries` newest first; `next` is the cursor of the next page, None at the end."""

    entries: tuple[AuditEntry, ...]
    next: int | None


class Refused(NamedTuple):
    """Requests of one kind that were refused. `what` is the action that they asked for."""

    actor: str
    tenant: str
    address: str | None
    what: str


class Refusals(NamedTuple):
    """How often requests of one kind were refused, and the id of the first of them."""

    num_requests: int
    request_id: str | None = None


class AuditState(NamedTuple):
    """The end of the audit log's chain. Who keeps it elsewhere finds later that entries were cut off.

    num_entries   those in the chain
    num_unlinked  those before it, which an older loray has written
    """

    num_entries: int
    num_unlinked: int
    last_id: int
    last_hash: str


class Audit(Database):
    """The catalog's operations on the audit log."""

    def note(self, action: str, subject: str, *, tenant: str, **detail: Any) -> None:
        """Add an entry for what writes nothing else, such as a download."""
        with writing(self._engine) as c:
            lock(c)
            log(c, self._actor, action, subject, tenant=tenant, **detail)

    def note_refused(self, refused: Mapping[Refused, Refusals]) -> None:
        """Add an entry for each kind of request, with how often it was refused."""
        with writing(self._engine) as c:
            lock(c)
            for one, (num_requests, request_id) in refused.items():
                origin = Origin(one.address, request_id)
                add_entry(c, one.actor, "refuse", one.what, one.tenant, {"count": num_requests}, origin)

    def verify_audit(self, known: tuple[int, str] | None = None) -> AuditState:
        """Compute all hashes of the log again. `known`: id and hash of an earlier end, which must still be there.

        Raises IntegrityError that names the first entry which was changed, or before which one is missing.
        """
        previous, num_entries, num_unlinked, last = "", 0, 0, 0
        is_known = known is None
        query = sa.select(audit_log).order_by(audit_log.c.id)
        with reading(self._engine) as c, c.execute(query, execution_options={"yield_per": 500}) as rows:
            for row in rows:
                if row.hash is None and not num_entries:
                    num_unlinked += 1
                    continue
                entry = row._asdict() | {"created_at": utc(row.created_at)}
                if row.previous_hash != previous or row.hash != chained(previous, entry):
                    raise IntegrityError(f"the audit log was changed: entry {row.id}, or one before it that is missing")
                previous, last, num_entries = row.hash, row.id, num_entries + 1
                is_known = is_known or (row.id, row.hash) == known
        if not is_known:
            raise IntegrityError("the audit log was changed: it does not have the entry with the known hash any more")
        return AuditState(num_entries, num_unlinked, last, previous)

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
    fields = {name: getattr(row, name) for name in AuditEntry.__dataclass_fields__}
    return AuditEntry(**fields | {"detail": json.loads(row.detail), "created_at": utc(row.created_at)})
