"""The catalog's operations on adapters in quarantine, on which replicas died as gateways report.

A row is forgotten KEPT after the last death. Rows are no changes of names: no snapshot is made for them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timedelta

import sqlalchemy as sa

from loray.catalog.audit_chain import log
from loray.catalog.database import Database, upsert
from loray.catalog.entries import Quarantined
from loray.catalog.queries import load_entry, make_quarantined
from loray.catalog.schema import quarantine
from loray.errors import NotFoundError, PermissionDenied

KEPT = timedelta(days=1)


@dataclass
class Quarantine:
    """The catalog's operations on quarantined adapters. Times are the callers', who share a clock."""

    db: Database

    def all(self) -> dict[str, Quarantined]:
        """All adapters in quarantine, by digest."""
        with self.db.reading() as c:
            return {row.digest: make_quarantined(row) for row in c.execute(sa.select(quarantine))}

    def report_death(
        self, digest: str, replica: str, at: datetime, refused_for: Callable[[int], timedelta | None]
    ) -> Quarantined:
        """Record that a replica has died with a request for the adapter. Several gateways may report one death.

        `refused_for`: for how long, after so many deaths; None: it is suspected, and not refused.
        """
        of_it = quarantine.c.digest == digest
        with self.db.changing() as c:
            c.execute(quarantine.delete().where(quarantine.c.died_at <= at - KEPT))
            row = c.execute(sa.select(quarantine).where(of_it)).first()
            if row is not None and row.replica == replica:
                return make_quarantined(row)
            deaths = 1 if row is None else row.deaths + 1
            refused = refused_for(deaths)
            until = None if refused is None else at + refused
            death = {"digest": digest, "deaths": deaths, "replica": replica, "died_at": at, "refused_until": until}
            upsert(c, quarantine, [death])
            log(c, self.db.actor, "quarantine", digest, deaths=deaths, replica=replica)
            return make_quarantined(c.execute(sa.select(quarantine).where(of_it)).one())

    def try_again(self, digest: str, at: datetime, until: datetime) -> bool:
        """The caller may try an adapter whose time is over, if True. It is refused to all others until `until`."""
        due = sa.and_(quarantine.c.digest == digest, quarantine.c.refused_until <= at)
        with self.db.writing() as c:
            return c.execute(quarantine.update().where(due).values(refused_until=until)).rowcount == 1

    def acquit(self, digest: str) -> None:
        """Suspect the adapter, and refuse it no longer: the caller had tokens of it before its only death."""
        first = sa.and_(quarantine.c.digest == digest, quarantine.c.deaths == 1)
        with self.db.writing() as c:
            c.execute(quarantine.update().where(first).values(refused_until=None))

    def clear(self, digest: str) -> None:
        """End the quarantine: a token of the adapter has come since."""
        with self.db.writing() as c:
            c.execute(quarantine.delete().where(quarantine.c.digest == digest))

    def release(self, name: str, version: int) -> None:
        """An administrator lifts the quarantine of a version: servers try it with the next request.

        Raises AdapterNotFound, PermissionDenied, and NotFoundError where it is not in quarantine.
        """
        if not self.db.principal.is_admin:
            raise PermissionDenied("only an administrator releases an adapter")
        with self.db.changing() as c:
            _, entry = load_entry(c, self.db.principal, name)
            digest = entry.select(str(version)).digest
            if not c.execute(quarantine.delete().where(quarantine.c.digest == digest)).rowcount:
                raise NotFoundError(f"{entry.name}@{version} is not in quarantine: no replica has died on it lately")
            log(c, self.db.actor, "release", f"{entry.name}@{version}", tenant=entry.tenant, digest=digest)
