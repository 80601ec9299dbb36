"""Entries of the audit log: each has the hash of the one before, so that a changed or removed one is found."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Any, NamedTuple

import sqlalchemy as sa

from loray.catalog.schema import audit_log
from loray.files import canonical_json
from loray.spec import DEFAULT_TENANT


class Origin(NamedTuple):
    """The address from which a request came, as far as the server knows it, and the id that its answer has."""

    address: str | None = None
    request_id: str | None = None


_NOWHERE = Origin()
_origin: ContextVar[Origin] = ContextVar("origin", default=_NOWHERE)


def origin() -> Origin:
    """The origin of the request that is answered now; its fields are None where no server answers one."""
    return _origin.get()


@contextmanager
def coming_from(origin: Origin) -> Iterator[None]:
    """Entries that the block adds, and threads that have its context, are of a request from there."""
    token = _origin.set(origin)
    try:
        yield
    finally:
        _origin.reset(token)


def log(
    c: sa.Connection, actor: str, action: str, subject: str, *, tenant: str = DEFAULT_TENANT, **detail: Any
) -> None:
    """Add an entry about the request that is answered now. `tenant` is the subject's. The transaction has the catalog's
    lock: entries follow each other.
    """
    entry: dict[str, Any] = {"actor": actor, "action": action, "subject": subject, "tenant": tenant}
    entry |= {"detail": json.dumps(detail), **origin()._asdict(), "created_at": datetime.now(UTC)}
    last = sa.select(audit_log.c.hash).order_by(audit_log.c.id.desc()).limit(1)
    previous = c.execute(last).scalar() or ""
    c.execute(audit_log.insert().values(entry | {"previous_hash": previous, "hash": chained(previous, entry)}))


def chained(previous: str, entry: Mapping[str, Any]) -> str:
    """The hash of an entry of the audit log, whose `created_at` has a time zone. `previous`: that of the entry before
    it; empty: it is the first one.
    """
    fields = {name: entry[name] for name in ("actor", "action", "subject", "tenant", "detail", "address")}
    if entry["request_id"] is not None:  # entries of no request do not have the field
        fields["request_id"] = entry["request_id"]
    said = canonical_json(fields | {"created_at": entry["created_at"].astimezone(UTC).isoformat()})
    return hashlib.sha256(f"{previous}\n{said}".encode()).hexdigest()
