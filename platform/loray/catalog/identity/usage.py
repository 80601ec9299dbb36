"""Usage: what each request used, summed up by tenant, key, model and day (UTC)."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict
from datetime import UTC, date, datetime
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from loray.catalog.database import Database, reading, writing
from loray.catalog.schema import usage
from loray.errors import SpecError
from loray.spec import USAGE_GROUPS, UsageEvent, UsageGroup

_COUNTS = ("num_prompt_tokens", "num_cached_tokens", "num_output_tokens", "seconds")


class UsageRow(NamedTuple):
    """Sums of a group; what it is not grouped by is None."""

    tenant: str | None
    key_id: str | None
    model: str | None
    day: date | None
    num_requests: int
    num_prompt_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    seconds: float


class Usage(Database):
    """The catalog's operations on usage. They neither count as changes nor wait for other writers."""

    def record_usage(self, events: Sequence[UsageEvent]) -> int:
        """Returns how many of them were new. An event that is known already changes nothing."""
        if not events:
            return 0
        rows = [asdict(e) | {"created_at": _utc(e.created_at)} for e in events]
        insert = sqlite.insert if self._engine.dialect.name == "sqlite" else postgresql.insert
        with writing(self._engine) as c:
            # Both dialects' statements have the method; it has no common type.
            statement: Any = insert(usage).values(rows)
            statement = statement.on_conflict_do_nothing(index_elements=["request_id"])
            return len(c.execute(statement.returning(usage.c.request_id)).all())

    def usage(
        self,
        group_by: Collection[UsageGroup],
        *,
        tenant: str | None = None,
        key_id: str | None = None,
        model: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int = 1000,
        offset: int = 0,
    ) -> tuple[UsageRow, ...]:
        """Sums over events from `since` until before `until`, in the order of their groups. Raises SpecError."""
        unknown = [group for group in group_by if group not in USAGE_GROUPS]
        if unknown:
            raise SpecError(f"usage is not grouped by {unknown[0]!r}: {', '.join(USAGE_GROUPS)}")
        groups = {name: column for name, column in self._groups().items() if name in group_by}
        columns = [column.label(f"group_{name}") for name, column in groups.items()]
        sums = [sa.func.coalesce(sa.func.sum(usage.c[name]), 0).label(name) for name in _COUNTS]
        query = sa.select(*columns, sa.func.count().label("num_requests"), *sums).select_from(usage)
        given = ((usage.c.tenant, tenant), (usage.c.key_id, key_id), (usage.c.model, model))
        query = query.where(*(column == value for column, value in given if value is not None))
        if since is not None:
            query = query.where(usage.c.created_at >= _utc(since))
        if until is not None:
            query = query.where(usage.c.created_at < _utc(until))
        query = query.group_by(*columns).order_by(*columns).limit(limit).offset(offset)
        with reading(self._engine) as c:
            return tuple(_row(row._mapping) for row in c.execute(query))

    def tokens_used(self, *, tenant: str | None = None, key_id: str | None = None, since: datetime) -> int:
        """Tokens of prompts and answers since then, of a tenant or of a key."""
        total = sa.func.coalesce(sa.func.sum(usage.c.num_prompt_tokens + usage.c.num_output_tokens), 0)
        query = sa.select(total).where(usage.c.created_at >= _utc(since))
        if tenant is not None:
            query = query.where(usage.c.tenant == tenant)
        if key_id is not None:
            query = query.where(usage.c.key_id == key_id)
        with reading(self._engine) as c:
            return int(c.execute(query).scalar_one())

    def forget_usage(self, before: datetime) -> int:
        """Deletes older events. Returns how many."""
        with writing(self._engine) as c:
            return int(c.execute(usage.delete().where(usage.c.created_at < _utc(before))).rowcount)

    def _groups(self) -> dict[str, sa.ColumnElement[Any]]:
        if self._engine.dialect.name == "sqlite":
            day: sa.ColumnElement[Any] = sa.func.date(usage.c.created_at)
        else:
            day = sa.func.to_char(sa.func.timezone(sa.literal_column("'UTC'"), usage.c.created_at), "YYYY-MM-DD")
        return {"tenant": usage.c.tenant, "key": usage.c.key_id, "model": usage.c.model, "day": day}


def _utc(value: datetime) -> datetime:
    """SQLite stores times without their zone. Raises SpecError."""
    try:
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    except OverflowError as e:  # in UTC it is before the year 1, or after 9999
        raise SpecError(f"{value.isoformat()} is out of range") from e


def _row(row: Any) -> UsageRow:
    day = row.get("group_day")
    return UsageRow(
        tenant=row.get("group_tenant"),
        key_id=row.get("group_key"),
        model=row.get("group_model"),
        day=None if day is None else date.fromisoformat(day),
        num_requests=row["num_requests"],
        num_prompt_tokens=int(row["num_prompt_tokens"]),
        num_cached_tokens=int(row["num_cached_tokens"]),
        num_output_tokens=int(row["num_output_tokens"]),
        seconds=float(row["seconds"]),
    )
