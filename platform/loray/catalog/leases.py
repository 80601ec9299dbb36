"""What one process at a time does, by a row of the database and its clock."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import sqlalchemy as sa

from loray.catalog.database import Database, upsert
from loray.catalog.schema import leases
from loray.errors import ConflictError

HOLD_S, RENEW_S = 15.0, 5.0  # how long a lease is taken for, and how often it is renewed


class Lease(NamedTuple):
    """`holder` does what `name` says."""

    name: str
    holder: str


@dataclass
class Leases:
    """The catalog's operations on leases. They do not count as changes."""

    db: Database

    def hold(self, lease: Lease) -> bool:
        """Take the lease for HOLD_S, or renew it. Returns False while another holds it."""
        with self.db.changing() as c:
            held = c.execute(sa.select(leases).where(leases.c.name == lease.name)).first()
            now = database_time(c)
            if held is not None and held.holder != lease.holder and held.until > now:
                return False
            upsert(c, leases, [{**lease._asdict(), "until": now + HOLD_S}])
            return True

    def leave(self, lease: Lease) -> None:
        """Let another take the lease at once."""
        with self.db.writing() as c:
            c.execute(leases.delete().where(leases.c.name == lease.name, leases.c.holder == lease.holder))


def check_lease(c: sa.Connection, lease: Lease) -> None:
    """Raise ConflictError where somebody else may hold the lease by now. The transaction has the catalog's lock."""
    held = sa.select(leases.c.until).where(leases.c.name == lease.name, leases.c.holder == lease.holder)
    until = c.execute(held).scalar()
    if until is None or until <= database_time(c):
        raise ConflictError(f"the lease {lease.name!r} has ended")


def database_time(c: sa.Connection) -> float:
    """Seconds since the epoch by the database's clock."""
    if c.dialect.name == "sqlite":
        return float(c.exec_driver_sql("SELECT (julianday('now') - 2440587.5) * 86400.0").scalar_one())
    return float(c.exec_driver_sql("SELECT extract(epoch FROM clock_timestamp())").scalar_one())
