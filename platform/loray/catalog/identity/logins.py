"""Browsers that are logged in at the console: in the database, so that every process of the API knows them."""

from __future__ import annotations

from datetime import timedelta

import sqlalchemy as sa

from loray.catalog.database import Database, reading, writing
from loray.catalog.queries import lock, log, now, utc
from loray.catalog.schema import logins

IDLE = timedelta(hours=12)
LONGEST = timedelta(hours=24)
MOST = 1000  # the one that was not used for longest makes room
_NOTED = timedelta(minutes=5)  # between two times that a use is written


class Logins(Database):
    """The catalog's operations on logins, which end at logout, `IDLE` after the last request, and after `LONGEST`."""

    def begin_login(self, cookie_sha256: str, sealed: str) -> None:
        """`sealed`: what `find_login` gives back. Logins that have ended are deleted."""
        moment = now()
        with writing(self._engine) as c:
            lock(c)
            ended = sa.or_(logins.c.used_at < moment - IDLE, logins.c.created_at < moment - LONGEST)
            c.execute(logins.delete().where(ended))
            newest = sa.select(logins.c.cookie_sha256).order_by(logins.c.used_at.desc()).limit(MOST - 1)
            c.execute(logins.delete().where(logins.c.cookie_sha256.not_in(newest)))
            row = {"cookie_sha256": cookie_sha256, "sealed": sealed, "created_at": moment, "used_at": moment}
            c.execute(logins.insert().values(row))
            log(c, self._actor, "login", "console", tenant=self._principal.tenant)

    def find_login(self, cookie_sha256: str) -> str | None:
        """What was sealed for this cookie; None where there is no such login, or it has ended."""
        moment, mine = now(), logins.c.cookie_sha256 == cookie_sha256
        with reading(self._engine) as c:
            row = c.execute(sa.select(logins).where(mine)).first()
        if row is None or moment > min(utc(row.used_at) + IDLE, utc(row.created_at) + LONGEST):
            return None
        if moment > utc(row.used_at) + _NOTED:
            with writing(self._engine) as c:
                c.execute(logins.update().where(mine).values(used_at=moment))
        return str(row.sealed)

    def end_login(self, cookie_sha256: str) -> None:
        """A login that has ended already stays so."""
        with writing(self._engine) as c:
            lock(c)
            if c.execute(logins.delete().where(logins.c.cookie_sha256 == cookie_sha256)).rowcount:
                log(c, self._actor, "logout", "console", tenant=self._principal.tenant)
