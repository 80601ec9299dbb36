"""Backups of the catalog: all rows as JSON lines, and back.

{"format": 1, "revision": "0015", "created_at": …}    the revision of the tables
{"table": "tenants", "columns": ["name", …]}          then its rows, one a line
["default", …]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from loray.catalog.audit_chain import log
from loray.catalog.database import HEAD, OLDEST, Database
from loray.catalog.queries import now
from loray.catalog.schema import (
    UtcTime,
    adapters,
    changes,
    claims,
    clusters,
    leases,
    logins,
    metadata,
    quota_levels,
    quota_owners,
    tenants,
    versions,
)
from loray.errors import ConflictError, DataError, IntegrityError, UnsupportedError
from loray.files import read_json_lines, replacing_private, write_json_lines
from loray.spec import DEFAULT_TENANT

_FORMAT = 1
_BATCH = 500  # rows
# Added to the change counter: what was given out after the backup, as ETags of aliases, must not come a second time.
_SKIPPED = 1 << 20
# Of what runs now, and logins: people log in again.
_NOT_KEPT = (claims, clusters, leases, logins, quota_levels, quota_owners)

Line = Mapping[str, Any] | Sequence[Any]


@dataclass(frozen=True, slots=True)
class BackupSummary:
    """The time at which a backup was made, and the numbers of its names and versions, deleted ones included."""

    created_at: datetime
    num_names: int
    num_versions: int


@dataclass
class Backup:
    """The catalog's operations that write and read backups."""

    db: Database

    def write(self, path: Path) -> BackupSummary:
        """Write all rows as they are at one moment, beside readers and writers. `path` is replaced when it is complete,
        and readable by this user only.
        """
        created_at = now()
        with self.db.reading() as c:
            with replacing_private(path) as f:
                write_json_lines(f, _lines(c, created_at))
            return _summary(c, created_at)

    def read(self, path: Path) -> BackupSummary:
        """Read a backup into this catalog, which must be empty, in one transaction. Its servers must not run.

        Raises ConflictError where it is not empty, DataError where there is no such file, IntegrityError where the file
        is damaged or not whole, and UnsupportedError where it is of a revision of the tables that is not read.
        """
        try:
            with path.open("rb") as f, self.db.changing() as c:
                _refuse_used(c)
                lines: Iterator[Line] = read_json_lines(f)
                created_at = _read_header(next(lines))
                _insert(c, lines)
                c.execute(changes.update().values(counter=changes.c.counter + _SKIPPED))
                log(c, self.db.actor, "restore_backup", "catalog", created_at=created_at.isoformat())
                return _summary(c, created_at)
        except OSError as e:
            raise DataError(f"the backup {path} cannot be read: {e.strerror}") from e
        except (AttributeError, IntegrityError, KeyError, StopIteration, TypeError, ValueError) as e:
            reason = str(e) if isinstance(e, IntegrityError) else f"it is damaged: {e!r}"
            raise IntegrityError(f"the backup {path} is not used: {reason}; nothing was restored") from e


def _lines(c: sa.Connection, created_at: datetime) -> Iterator[Line]:
    yield {"format": _FORMAT, "revision": HEAD, "created_at": created_at.isoformat()}
    for table in _tables():
        rows = c.execute(sa.select(table).order_by(*table.primary_key), execution_options={"yield_per": _BATCH})
        yield from table_lines(table, rows)


def table_lines(table: sa.Table, rows: Iterable[sa.Row[Any]]) -> Iterator[Line]:
    """The lines of a table and its rows."""
    yield {"table": table.name, "columns": [column.name for column in table.columns]}
    for row in rows:
        yield [v.astimezone(UTC).isoformat() if isinstance(v, datetime) else v for v in row]


def _read_header(line: Line) -> datetime:
    """The time at which the backup was made. Raises UnsupportedError where its revision is not read."""
    if not isinstance(line, Mapping) or "format" not in line:
        raise IntegrityError("it is no backup of a catalog")
    if line["format"] != _FORMAT or not OLDEST <= str(line["revision"]) <= HEAD:
        raise UnsupportedError(
            f"the backup was made by another loray (format {line['format']}, revision {line['revision']}; this one "
            f"reads format {_FORMAT}, revisions {OLDEST} to {HEAD}): restore it with that one"
        )
    return datetime.fromisoformat(line["created_at"])


def _rows(lines: Iterable[Line]) -> Iterator[tuple[sa.Table, dict[str, Any]]]:
    """(table, row) in the file's order. Raises IntegrityError where a line is neither a table nor a row of it."""
    table: sa.Table | None = None
    columns: list[sa.Column[Any]] = []
    times: set[str] = set()
    for line in lines:
        if isinstance(line, Mapping):
            table = metadata.tables[line["table"]]
            columns = [table.columns[name] for name in line["columns"]]
            times = {column.name for column in columns if isinstance(column.type, UtcTime)}
            continue
        if table is None:
            raise IntegrityError("it has a row before its first table")
        row = {column.name: v for column, v in zip(columns, line, strict=True) if column.computed is None}
        yield table, {name: v and datetime.fromisoformat(v) if name in times else v for name, v in row.items()}


def _tables() -> list[sa.Table]:
    return [table for table in metadata.sorted_tables if table not in _NOT_KEPT]


def _refuse_used(c: sa.Connection) -> None:
    for table in _tables():
        used = sa.select(sa.literal(1)).select_from(table).limit(1)
        if table is tenants:
            used = used.where(tenants.c.name != DEFAULT_TENANT)
        if table is not changes and c.execute(used).first() is not None:
            raise ConflictError(
                f"the catalog is not empty (it has {table.name}): stop its servers, and name an empty database in "
                "LORAY_CATALOG"
            )


def _insert(c: sa.Connection, lines: Iterator[Line]) -> None:
    for table in (tenants, changes):  # of the empty catalog
        c.execute(table.delete())
    for table, rows in groupby(_rows(lines), key=itemgetter(0)):
        while batch := [row for _, row in islice(rows, _BATCH)]:
            c.execute(table.insert(), batch)
        _move_sequence(c, table)


def _move_sequence(c: sa.Connection, table: sa.Table) -> None:
    """Behind the ids that were given, which do not move a sequence of PostgreSQL."""
    column = table.autoincrement_column
    if column is not None and c.dialect.name == "postgresql":
        sequence = sa.func.pg_get_serial_sequence(table.name, column.name)
        c.execute(sa.select(sa.func.setval(sequence, sa.select(sa.func.max(column)).scalar_subquery())))


def _summary(c: sa.Connection, created_at: datetime) -> BackupSummary:
    names, found = (c.execute(sa.select(sa.func.count()).select_from(t)).scalar_one() for t in (adapters, versions))
    return BackupSummary(created_at, names, found)
