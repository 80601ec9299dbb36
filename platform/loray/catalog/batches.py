"""The catalog's operations on batches: requests in a file, which are answered behind those of people.

A batch exists for its own tenant alone. Whoever asks creates and cancels it; all else is written by the process that
holds the lease of batches, and each write looks whether it still does.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal, NamedTuple

import sqlalchemy as sa

from loray.catalog.audit_chain import log
from loray.catalog.database import Database
from loray.catalog.files import ENDED, OutputFile, finish_file, get_file, new_id
from loray.catalog.leases import Lease, check_lease
from loray.catalog.queries import beyond, now
from loray.catalog.schema import batches
from loray.errors import BatchNotFound, ConflictError, RateLimited, RequestError, shown

BatchState = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]
WINDOW = timedelta(hours=24)
MAX_UNFINISHED, MAX_LINES = 8, 500_000  # of a tenant
_RETRY_S = 60.0  # after which a batch may have ended


class BatchError(NamedTuple):
    """Why a batch failed, waits or was cancelled. `line` is the number of one of the input, from 1 on."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class Batch(NamedTuple):
    """`total`, `completed` and `failed` count lines; `key_id` is the key that created it; `output_expires_after` is in
    seconds.
    """

    id: str
    tenant: str
    key_id: str | None
    input_file_id: str
    endpoint: str
    state: BatchState
    metadata: Mapping[str, str]
    errors: Sequence[BatchError]
    output_file_id: str | None
    error_file_id: str | None
    total: int
    completed: int
    failed: int
    output_expires_after: int | None
    created_at: datetime
    expires_at: datetime
    in_progress_at: datetime | None
    finalizing_at: datetime | None
    completed_at: datetime | None
    failed_at: datetime | None
    expired_at: datetime | None
    cancelling_at: datetime | None
    cancelled_at: datetime | None

    @property
    def has_ended(self) -> bool:
        return self.state in ENDED


class BatchPage(NamedTuple):
    batches: tuple[Batch, ...]
    has_more: bool


@dataclass
class Batches:
    """The catalog's operations on batches. They do not count as changes."""

    db: Database

    def create(
        self,
        input_file_id: str,
        endpoint: str,
        *,
        metadata: Mapping[str, str] | None = None,
        output_expires_after: int | None = None,
    ) -> Batch:
        """Create a batch of a file of the caller. Raises UserFileNotFound, RequestError where its purpose is another,
        and RateLimited where too many of the tenant are not finished.
        """
        principal = self.db.principal
        with self.db.changing() as c:
            file = get_file(c, principal, input_file_id)
            if file.purpose != "batch":
                raise RequestError(f"file {file.id} has the purpose {file.purpose}, not batch", "input_file_id")
            unfinished = sa.select(sa.func.count()).select_from(batches)
            unfinished = unfinished.where(batches.c.tenant == principal.tenant, batches.c.state.not_in(ENDED))
            if c.execute(unfinished).scalar_one() >= MAX_UNFINISHED:
                raise RateLimited(
                    f"tenant {principal.tenant} has {MAX_UNFINISHED} batches that are not finished, which is the most: "
                    "wait for one, or cancel one",
                    _RETRY_S,
                )
            created_at = now()
            row = {
                "id": new_id("batch"),
                "tenant": principal.tenant,
                "key_id": principal.key_id,
                "input_file_id": file.id,
                "endpoint": endpoint,
                "state": "validating",
                "metadata": json.dumps(dict(metadata or {})),
                "errors": "[]",
                "output_expires_after": output_expires_after,
                "created_at": created_at,
                "expires_at": created_at + WINDOW,
            }
            c.execute(batches.insert().values(row))
            log(c, self.db.actor, "add_batch", str(row["id"]), tenant=principal.tenant, file=file.id)
            return self._get(c, str(row["id"]))

    def get(self, batch_id: str) -> Batch:
        """One batch. Raises BatchNotFound."""
        with self.db.reading() as c:
            return self._get(c, batch_id)

    def page(self, *, limit: int, after: str | None = None) -> BatchPage:
        """At most `limit` batches, newest first, after the batch `after`. Raises RequestError."""
        mine = batches.c.tenant == self.db.principal.tenant
        query = sa.select(batches).where(mine)
        with self.db.reading() as c:
            if after is not None:
                if (older := beyond(c, batches, mine, after)) is None:
                    raise RequestError(f"{shown(after)} is no batch; take `last_id` of the page before", "after")
                query = query.where(older)
            rows = c.execute(query.order_by(batches.c.created_at.desc(), batches.c.id.desc()).limit(limit + 1)).all()
        return BatchPage(tuple(map(_batch, rows[:limit])), len(rows) > limit)

    def cancel(self, batch_id: str) -> Batch:
        """Begin to cancel a batch; one that is being cancelled stays so. Raises BatchNotFound, ConflictError."""
        with self.db.changing() as c:
            batch = self._get(c, batch_id)
            if batch.state not in ("validating", "in_progress", "cancelling", "cancelled"):
                raise ConflictError(f"batch {batch.id} is {batch.state} and cannot be cancelled any more")
            if batch.state in ("validating", "in_progress"):
                _update(c, batch.id, {"state": "cancelling", "cancelling_at": now()})
                log(c, self.db.actor, "cancel_batch", batch.id, tenant=batch.tenant)
            return self._get(c, batch_id)

    # -- who holds the lease ------------------------------------------------------------------------------------------

    def unfinished(self) -> list[Batch]:
        """The batches of all tenants that have not ended, the oldest first."""
        query = sa.select(batches).where(batches.c.state.not_in(ENDED))
        with self.db.reading() as c:
            return [_batch(row) for row in c.execute(query.order_by(batches.c.created_at, batches.c.id))]

    def ended_lately(self) -> list[Batch]:
        """The batches of all tenants that have ended and whose time is not over."""
        query = sa.select(batches).where(batches.c.state.in_(ENDED), batches.c.expires_at > now())
        with self.db.reading() as c:
            return [_batch(row) for row in c.execute(query)]

    def begin(self, lease: Lease, batch_id: str, total: int) -> None:
        """The input is valid and has so many lines. Raises RequestError where the tenant would have too many."""
        with self._leading(lease) as c:
            batch = _any(c, batch_id)
            others = sa.select(sa.func.coalesce(sa.func.sum(batches.c.total), 0))
            others = others.where(batches.c.tenant == batch.tenant, batches.c.state.not_in(ENDED))
            if int(c.execute(others.where(batches.c.id != batch_id)).scalar_one()) + total > MAX_LINES:
                raise RequestError(f"tenant {batch.tenant} has more than {MAX_LINES:,} lines in unfinished batches")
            _update(c, batch_id, {"state": "in_progress", "in_progress_at": now(), "total": total}, "validating")

    def fail(self, lease: Lease, batch_id: str, errors: Sequence[BatchError]) -> None:
        """The input is not valid."""
        values = {"state": "failed", "failed_at": now(), "errors": _errors(errors)}
        with self._leading(lease) as c:
            _update(c, batch_id, values, "validating")

    def progress(self, lease: Lease, batch_id: str, completed: int, failed: int, errors: Sequence[BatchError]) -> None:
        """Note how many lines have an answer, and why others wait."""
        with self._leading(lease) as c:
            _update(c, batch_id, {"completed": completed, "failed": failed, "errors": _errors(errors)})

    def revoke(self, lease: Lease, batch_id: str, error: BatchError) -> None:
        """Begin to cancel a batch whose key may ask nothing any more."""
        with self._leading(lease) as c:
            values = {"state": "cancelling", "cancelling_at": now(), "errors": _errors([error])}
            _update(c, batch_id, values, "validating", "in_progress")

    def finalize(self, lease: Lease, batch_id: str) -> None:
        """All lines have an answer, or the batch's time is over: its files are being written."""
        with self._leading(lease) as c:
            _update(c, batch_id, {"state": "finalizing", "finalizing_at": now()}, "in_progress")

    def end(
        self,
        lease: Lease,
        batch_id: str,
        state: Literal["completed", "expired", "cancelled"],
        completed: int,
        failed: int,
        *,
        output: OutputFile | None,
        errors: OutputFile | None,
    ) -> None:
        """End a batch, whose files exist from the same moment on."""
        with self._leading(lease) as c:
            for file in (output, errors):
                if file is not None:
                    finish_file(c, file)
            ids = {"output_file_id": output and output.id, "error_file_id": errors and errors.id}
            counts = {"completed": completed, "failed": failed}
            _update(c, batch_id, {"state": state, f"{state}_at": now()} | ids | counts, "finalizing", "cancelling")
            log(c, self.db.actor, "end_batch", batch_id, tenant=_any(c, batch_id).tenant, state=state)

    @contextmanager
    def _leading(self, lease: Lease) -> Iterator[sa.Connection]:
        """A transaction of who holds the lease. Raises ConflictError."""
        with self.db.changing() as c:
            check_lease(c, lease)
            yield c

    def _get(self, c: sa.Connection, batch_id: str) -> Batch:
        mine = sa.and_(batches.c.id == batch_id, batches.c.tenant == self.db.principal.tenant)
        row = c.execute(sa.select(batches).where(mine)).first()
        if row is None:
            raise BatchNotFound(f"there is no batch {shown(batch_id)}; GET /v1/batches lists those of this tenant")
        return _batch(row)


def _any(c: sa.Connection, batch_id: str) -> Batch:
    return _batch(c.execute(sa.select(batches).where(batches.c.id == batch_id)).one())


def _update(c: sa.Connection, batch_id: str, values: Mapping[str, Any], *states: BatchState) -> None:
    """Change a batch. Raises ConflictError where it is in none of `states`."""
    changed = batches.update().where(batches.c.id == batch_id)
    if states:
        changed = changed.where(batches.c.state.in_(states))
    if not c.execute(changed.values(values)).rowcount:
        raise ConflictError(f"batch {batch_id} is not {' or '.join(states)} any more")


def _errors(errors: Collection[BatchError]) -> str:
    return json.dumps([error._asdict() for error in errors])


def _batch(row: sa.Row[Any]) -> Batch:
    fields = {name: getattr(row, name) for name in Batch._fields}
    errors = tuple(BatchError(**error) for error in json.loads(fields["errors"]))
    return Batch(**fields | {"metadata": json.loads(fields["metadata"]), "errors": errors})
