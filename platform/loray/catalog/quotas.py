"""The catalog's operations on limits that several owners count: how much of them is used.

Times are seconds since the epoch by the owners' clocks, which must agree within a few seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa

from loray.catalog.database import Database, upsert
from loray.catalog.schema import quota_levels, quota_owners

OWNER_IS_GONE_S = 15.0  # without a word
_LOCK = 0x71756F746173  # key of a PostgreSQL advisory lock: owners wait for each other, and for no other writer
_BATCH = 500  # rules of a statement


class QuotaUse(NamedTuple):
    """Units that an owner counted of one limit since it last told.

    rule         names the limit, and of a budget the period
    units        taken, less those given back
    rate         units a second that come back
    ends_at      of a budget's period; 0 for limits whose units come back
    used_before  what the usage has, where the owner begins to count a budget; None: it has begun
    """

    rule: str
    units: float
    rate: float
    ends_at: float = 0.0
    used_before: float | None = None


class QuotaState(NamedTuple):
    """`used`: rule → units that all owners have taken and that have not come back."""

    num_owners: int
    used: dict[str, float]


@dataclass
class Quotas:
    """The catalog's operations on limits. They neither count as changes nor wait for other writers."""

    db: Database

    def count(self, owner: str, uses: Sequence[QuotaUse], now: float) -> QuotaState:
        """Record that the owner is there and what it counted. Returns what is used of these limits, and how many owners
        there are, this one included.
        """
        with self.db.writing() as c:
            if c.dialect.name == "postgresql":
                c.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
            seen, ends_at = quota_owners.c.seen_at, quota_levels.c.ends_at
            is_gone = sa.or_(seen < now - OWNER_IS_GONE_S, seen > now + OWNER_IS_GONE_S)  # later: a clock went back
            c.execute(quota_owners.delete().where(is_gone))
            upsert(c, quota_owners, [{"id": owner, "seen_at": now}])
            num_owners = c.execute(sa.select(sa.func.count()).select_from(quota_owners)).scalar_one()
            c.execute(quota_levels.delete().where(ends_at <= now))
            used: dict[str, float] = {}
            for start in range(0, len(uses), _BATCH):
                used |= self._count(c, uses[start : start + _BATCH], now, is_alone=num_owners == 1)
            return QuotaState(num_owners, used)

    def known(self, now: float) -> dict[str, tuple[float, float]]:
        """Rule → units that are used, and when they were, of what an owner that starts anew has to know. It asks for
        budgets when it begins to count them.
        """
        query = sa.select(quota_levels).where(quota_levels.c.ends_at > now, quota_levels.c.rule.not_like("budget %"))
        with self.db.reading() as c:
            return {row.rule: (row.used, row.at) for row in c.execute(query)}

    def leave(self, owner: str) -> None:
        """Remove an owner that counts nothing any more."""
        with self.db.writing() as c:
            c.execute(quota_owners.delete().where(quota_owners.c.id == owner))

    def _count(self, c: sa.Connection, uses: Sequence[QuotaUse], now: float, *, is_alone: bool) -> dict[str, float]:
        query = sa.select(quota_levels).where(quota_levels.c.rule.in_([use.rule for use in uses]))
        known = {row.rule: row for row in c.execute(query)}
        used: dict[str, float] = {}
        rows: list[dict[str, Any]] = []
        for use in uses:
            row = known.get(use.rule)
            before = 0.0 if row is None else max(0.0, row.used - use.rate * max(0.0, now - row.at))
            # Nobody else has reserved anything: what servers reserved that were lost is free again.
            if use.used_before is not None and (row is None or is_alone):
                before = use.used_before
            used[use.rule] = max(0.0, before + use.units)
            if use.units or use.used_before is not None:
                ends_at = now + used[use.rule] / use.rate if use.rate else use.ends_at
                rows.append({"rule": use.rule, "used": used[use.rule], "at": now, "ends_at": ends_at})
        upsert(c, quota_levels, rows)
        return used
