"""The rows of canaries, inside of the transactions of those who write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from loray.catalog.queries import alias_is, now, utc
from loray.catalog.schema import aliases, canaries, versions
from loray.spec import CanaryBounds, CanaryCounts, CanaryOutcome, CanaryState

_stable, _new = versions.alias("stable"), versions.alias("new")
_STATES = (
    sa.select(canaries, _stable.c.version.label("stable"), _new.c.version)
    .join(_stable, _stable.c.id == canaries.c.stable_id)
    .join(_new, _new.c.id == canaries.c.version_id)
    .order_by(canaries.c.ended_at.is_not(None), canaries.c.id.desc())
)


def load_states(c: sa.Connection, *where: sa.ColumnElement[bool], limit: int | None = None) -> list[CanaryState]:
    """Canaries for which the conditions hold: those that run, then the newest first."""
    return [_state(row) for row in c.execute(_STATES.where(*where).limit(limit))]


def running(adapter_id: int, alias: str) -> sa.ColumnElement[bool]:
    return sa.and_(canaries.c.adapter_id == adapter_id, canaries.c.alias == alias, canaries.c.ended_at.is_(None))


def end_running(
    c: sa.Connection,
    adapter_id: int,
    alias: str,
    revision: int,
    outcome: CanaryOutcome,
    reason: str | None = None,
    target: int | None = None,
) -> CanaryState | None:
    """Give all requests of the alias to the version that it points at, and the alias this revision. A canary that the
    alias moves to (`target`) is promoted, whatever `outcome` says.

    Returns the canary that ran until now; None: there was none, and nothing has changed.
    """
    found = load_states(c, running(adapter_id, alias))
    if not found:
        return None
    outcome = "promoted" if found[0].version == target else outcome
    end = {"ended_at": now(), "outcome": outcome, "reason": reason}
    c.execute(canaries.update().where(canaries.c.id == found[0].id).values(end))
    c.execute(aliases.update().where(alias_is(adapter_id, alias)).values(revision=revision))
    return found[0]


def read_reports(text: str) -> dict[str, CanaryCounts]:
    """Gateway → what it has counted so far."""
    return {gateway: CanaryCounts.of_json(fields) for gateway, fields in json.loads(text).items()}


def write_reports(reports: Mapping[str, CanaryCounts]) -> str:
    return json.dumps(reports, separators=(",", ":"))


def total(reports: Mapping[str, CanaryCounts]) -> CanaryCounts:
    return sum(reports.values(), CanaryCounts())


def _state(row: sa.Row[Any]) -> CanaryState:
    return CanaryState(
        id=row.id,
        alias=row.alias,
        stable=row.stable,
        version=row.version,
        percent=row.percent,
        bounds=CanaryBounds.model_validate_json(row.bounds),
        counts=total(read_reports(row.reports)),
        created_at=utc(row.created_at),
        ended_at=None if row.ended_at is None else utc(row.ended_at),
        outcome=row.outcome,
        reason=row.reason,
    )
