"""The catalog's operations on usage, summed by tenant, key, model and day.

Sums of whole days are kept as events come, so that what is asked of a month does not read its requests.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, time, timedelta
from typing import Any

import sqlalchemy as sa

from loray.catalog.database import Database, insert_into
from loray.catalog.schema import TOKENS, usage, usage_days
from loray.errors import DataError, SpecError
from loray.schemas.resources import UsageResource
from loray.spec import BATCH_TIER, USAGE_GROUPS, UsageEvent, UsageGroup

_COUNTS = ("num_requests", *TOKENS, "seconds", "num_batch_tokens")
_COLUMNS: dict[UsageGroup, str] = {"tenant": "tenant", "key": "key_id", "model": "model", "day": "day"}
_NO_KEY = ""  # in usage_days, whose primary key has no null


@dataclass
class UsageTable:
    """The catalog's operations on usage. They neither count as changes nor wait for other writers."""

    db: Database

    def record(self, events: Sequence[UsageEvent]) -> int:
        """Record events, and return how many of them were new. One that is known already changes nothing.

        Raises DataError where the database refuses what one of them has; then none is recorded.
        """
        if not events:
            return 0
        rows = [asdict(e) | {"created_at": _utc(e.created_at)} for e in events]
        with self.db.writing() as c:
            try:
                statement = insert_into(c, usage).on_conflict_do_nothing(index_elements=["request_id"])
                new = set(c.scalars(statement.returning(usage.c.request_id), rows))
                if new:
                    self._add_to_days(c, {row["request_id"]: row for row in rows if row["request_id"] in new}.values())
            except (sa.exc.DataError, sa.exc.IntegrityError) as e:
                raise DataError(f"the catalog refuses a usage event: {str(e.orig).strip()}") from e
            return len(new)

    def _add_to_days(self, c: sa.Connection, rows: Collection[dict[str, Any]]) -> None:
        """Add rows of events to the sums of their days, in the order of the primary key: writers do not deadlock."""
        sums: dict[tuple[str, str, str, str], dict[str, Any]] = {}
        for row in rows:
            of = (row["created_at"].date().isoformat(), row["tenant"], row["key_id"] or _NO_KEY, row["model"])
            of_batch = row["num_prompt_tokens"] + row["num_output_tokens"] if row["tier"] == BATCH_TIER else 0
            counts = row | {"num_requests": 1, "num_batch_tokens": of_batch}
            known = sums.setdefault(of, dict.fromkeys(_COUNTS, 0))
            sums[of] = {name: known[name] + counts[name] for name in _COUNTS}
        names = [column.name for column in usage_days.primary_key]
        values = [dict(zip(names, of, strict=True)) | counts for of, counts in sorted(sums.items())]
        statement = insert_into(c, usage_days)
        added = {name: usage_days.c[name] + statement.excluded[name] for name in _COUNTS}
        c.execute(statement.on_conflict_do_update(index_elements=names, set_=added), values)

    def sums(
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
    ) -> tuple[UsageResource, ...]:
        """Sums over events from `since` until before `until`, in the order of their groups. Raises SpecError."""
        unknown = [group for group in group_by if group not in USAGE_GROUPS]
        if unknown:
            raise SpecError(f"usage is not grouped by {unknown[0]!r}: {', '.join(USAGE_GROUPS)}")
        given = {"tenant": tenant, "key_id": key_id, "model": model}
        found = self._rows(given, since and _utc(since), until and _utc(until)).subquery()
        columns = [found.c[column] for name, column in _COLUMNS.items() if name in group_by]
        sums = [sa.func.coalesce(sa.func.sum(found.c[name]), 0).label(name) for name in _COUNTS]
        query = sa.select(*columns, *sums).select_from(found)
        query = query.group_by(*columns).order_by(*columns).limit(limit).offset(offset)
        with self.db.reading() as c:
            rows = [row._asdict() for row in c.execute(query)]
        ungrouped: dict[str, Any] = dict.fromkeys(_COLUMNS.values())
        return tuple(UsageResource(**ungrouped | row | {"key_id": row.get("key_id") or None}) for row in rows)

    def _rows(
        self, given: dict[str, str | None], since: datetime | None, until: datetime | None
    ) -> sa.CompoundSelect[Any]:
        """Sums of the whole days from `since` until before `until`, and the events before and after these days."""
        first = None if since is None else _midnight(since, is_next=True)
        last = None if until is None else _midnight(until)
        days = sa.select(*(usage_days.c[name].label(name) for name in (*_COLUMNS.values(), *_COUNTS)))
        events = sa.select(
            *self._columns(),
            sa.literal(1).label("num_requests"),
            *(usage.c[name] for name in _COUNTS[1:-1]),
            sa.case((usage.c.tier == BATCH_TIER, usage.c.num_prompt_tokens + usage.c.num_output_tokens), else_=0),
        )
        if first is not None:
            days = days.where(usage_days.c.day >= first.date().isoformat())
        if last is not None:
            days = days.where(usage_days.c.day < last.date().isoformat())
        if first is not None and last is not None and first >= last:  # no whole day
            days, edges = days.where(sa.false()), [sa.and_(usage.c.created_at >= since, usage.c.created_at < until)]
        else:
            before = None if first == since else sa.and_(usage.c.created_at >= since, usage.c.created_at < first)
            after = None if last == until else sa.and_(usage.c.created_at >= last, usage.c.created_at < until)
            edges = [edge for edge in (before, after) if edge is not None]
        events = events.where(sa.or_(sa.false(), *edges))
        for name, value in given.items():
            if value is not None:
                days, events = days.where(usage_days.c[name] == value), events.where(usage.c[name] == value)
        return sa.union_all(days, events)

    def tokens(
        self, *, tenant: str | None = None, key_id: str | None = None, since: datetime, batch_factor: float = 1.0
    ) -> float:
        """Tokens of prompts and answers since then, of a tenant or of a key; those of batches times `batch_factor`."""
        (found,) = self.sums([], tenant=tenant, key_id=key_id, since=since)
        num_tokens = found.num_prompt_tokens + found.num_output_tokens
        return num_tokens - (1 - batch_factor) * found.num_batch_tokens

    def forget(self, before: datetime) -> int:
        """Delete events and sums of the days before `before`. Returns how many events that was."""
        midnight = _midnight(_utc(before))
        with self.db.writing() as c:
            c.execute(usage_days.delete().where(usage_days.c.day < midnight.date().isoformat()))
            return int(c.execute(usage.delete().where(usage.c.created_at < midnight)).rowcount)

    def _columns(self) -> list[sa.ColumnElement[Any]]:
        """The columns of `usage` that `usage_days` has too, as it has them."""
        if self.db.engine.dialect.name == "sqlite":
            day: sa.ColumnElement[Any] = sa.func.date(usage.c.created_at)
        else:
            day = sa.func.to_char(sa.func.timezone(sa.literal_column("'UTC'"), usage.c.created_at), "YYYY-MM-DD")
        key_id = sa.func.coalesce(usage.c.key_id, _NO_KEY)
        return [usage.c.tenant, key_id.label("key_id"), usage.c.model, day.label("day")]


def _midnight(moment: datetime, *, is_next: bool = False) -> datetime:
    """The last midnight until `moment`, or the next one from then on. Raises SpecError."""
    midnight = datetime.combine(moment.date(), time(), UTC)
    try:
        return midnight + timedelta(days=1) if is_next and midnight < moment else midnight
    except OverflowError as e:  # after 9999
        raise SpecError(f"{moment.isoformat()} is out of range") from e


def _utc(value: datetime) -> datetime:
    """The time in UTC, since SQLite stores it without its zone. Raises SpecError."""
    try:
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)
    except OverflowError as e:  # in UTC it is before the year 1, or after 9999
        raise SpecError(f"{value.isoformat()} is out of range") from e
