"""The file of a backup: JSON lines, the last of which has the SHA-256 of those before.

{"format": 1, "revision": "0006", "created_at": …}    the revision of the tables
{"table": "tenants", "columns": ["name", …]}          then its rows, one a line
["default", …]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from loray.catalog.queries import utc
from loray.errors import IntegrityError, UnsupportedError

_FORMAT = 1

Line = Mapping[str, Any] | Sequence[Any]


@dataclass(frozen=True, slots=True)
class BackupSummary:
    """When a backup was made, and how many names and versions it has, deleted ones included."""

    created_at: datetime
    num_names: int
    num_versions: int


def header(revision: str, created_at: datetime) -> Line:
    return {"format": _FORMAT, "revision": revision, "created_at": created_at.isoformat()}


def read_header(line: Line, revision: str) -> datetime:
    """When the backup was made. Raises UnsupportedError where its tables are not of this revision."""
    if not isinstance(line, Mapping) or "format" not in line:
        raise IntegrityError("it is no backup of a catalog")
    if line["format"] != _FORMAT or line["revision"] != revision:
        raise UnsupportedError(
            f"the backup was made by another loray (format {line['format']}, revision {line['revision']}; this one "
            f"reads format {_FORMAT}, revision {revision}): restore it with that one, then upgrade"
        )
    return datetime.fromisoformat(line["created_at"])


def table_lines(table: sa.Table, rows: Iterable[sa.Row[Any]]) -> Iterator[Line]:
    yield {"table": table.name, "columns": [column.name for column in table.columns]}
    for row in rows:
        yield [utc(v).astimezone(UTC).isoformat() if isinstance(v, datetime) else v for v in row]


def rows_of(lines: Iterable[Line], tables: Mapping[str, sa.Table]) -> Iterator[tuple[sa.Table, dict[str, Any]]]:
    """(table, row) in the file's order. Raises IntegrityError where a line is neither a table nor a row of it."""
    table: sa.Table | None = None
    columns: list[sa.Column[Any]] = []
    for line in lines:
        if isinstance(line, Mapping):
            table = tables[line["table"]]
            columns = [table.columns[name] for name in line["columns"]]
            continue
        if table is None:
            raise IntegrityError("it has a row before its first table")
        yield table, {column.name: _value(column, v) for column, v in zip(columns, line, strict=True)}


def _value(column: sa.Column[Any], value: Any) -> Any:
    is_time = value is not None and isinstance(column.type, sa.DateTime)
    return datetime.fromisoformat(value) if is_time else value
