"""Claims on the store's objects, so that no object is deleted on which a publication relies.

A publication claims the names of its objects before it looks at the store, and its registration ends the claim. A
collection claims what it is about to delete, in the transaction in which it finds that neither a version nor a
publication needs it, and ends its claim when the store has answered every deletion. A publication waits while a
collection has one of its names. So each looks at the store, or deletes, after the other has ended or does without the
object, and nobody holds a lock meanwhile.

A claim of a process that was killed lapses. Its process may act on it for a part of that time only: a publication that
takes longer is refused, and a collection ends a batch after seconds.
"""

from __future__ import annotations

import secrets
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from time import monotonic, sleep
from typing import NamedTuple

import sqlalchemy as sa

from loray.catalog.database import Database, writing
from loray.catalog.queries import lock, log, now
from loray.catalog.removal.references import References, needed_files
from loray.catalog.schema import metadata
from loray.errors import CatalogError, ConflictError

claims = sa.Table(
    "claims",
    metadata,
    sa.Column("name", sa.String(64), primary_key=True),  # the object's SHA-256
    sa.Column("claim", sa.String(32), primary_key=True),
    sa.Column("deletes", sa.Boolean, nullable=False),  # the claim is a collection's
    sa.Column("claimed_at", sa.DateTime(timezone=True), nullable=False),
)

_LONGEST_PUBLICATION = timedelta(hours=12)
_PUBLICATION_LAPSES = timedelta(hours=24)
_DELETION_LAPSES = timedelta(minutes=10)  # no deletion begins after _BATCH_S, and one may take minutes
_LONGEST_WAIT_S = 30.0  # for a batch
_POLL_S = 0.2
_BATCH_S = 5.0


class Allowed(NamedTuple):
    """Names of objects that may be deleted before `until`, a time of this process's monotonic clock in seconds."""

    names: frozenset[str]
    until: float


class Claims(Database):
    """The catalog's operations that order publications and deletions in the store."""

    @contextmanager
    def publishing(self, names: Collection[str]) -> Iterator[str]:
        """Around a publication: the store's objects of these names, SHA-256, are not deleted.

        Yields the claim, which `register` and `restore` take and end. Waits for the end of a batch that deletes one of
        the objects; raises ConflictError where it does not end.
        """
        claim, give_up = secrets.token_hex(16), monotonic() + _LONGEST_WAIT_S
        while not self._claim_to_publish(claim, names):
            if monotonic() >= give_up:
                raise ConflictError(
                    "a garbage collection of the store was cut off while it deleted the same files; try again in "
                    f"{_DELETION_LAPSES.total_seconds() / 60:g} minutes"
                )
            sleep(_POLL_S)
        try:
            yield claim
        except BaseException:
            with suppress(CatalogError):  # otherwise it lapses
                _drop(self._engine, claim)
            raise

    @contextmanager
    def deleting(self, names: Collection[str], before: References, *, keep_deleted_s: float) -> Iterator[Allowed]:
        """Around a batch of deletions: yields those of `names` that nothing has come to need since `before`. Where the
        block raises, a deletion may still be under way: the claim is kept, and lapses.
        """
        claim = secrets.token_hex(16)
        with writing(self._engine) as c:
            lock(c)
            until = monotonic() + _BATCH_S
            publications = c.execute(_holding(deletes=False).where(claims.c.name.in_(names))).scalars()
            found = needed_files(c, keep_deleted_s, since=before.counter)
            needed = {name for digest, files in found for name in (digest, *files)} | set(publications)
            free = frozenset(names) - needed
            _insert(c, claim, free, deletes=True)
            log(c, self._actor, "collect", "store")
        yield Allowed(free, until)
        _drop(self._engine, claim)

    def _claim_to_publish(self, claim: str, names: Collection[str]) -> bool:
        """False where a collection deletes one of the objects."""
        with writing(self._engine) as c:
            lock(c)
            if not set(names).isdisjoint(c.execute(_holding(deletes=True)).scalars()):
                return False
            _insert(c, claim, names, deletes=False)
            return True


def end_claim(c: sa.Connection, claim: str | None) -> None:
    """End a publication's claim, within its registration. Raises ConflictError where it was claimed too long ago."""
    if claim is None:
        return
    mine = (claims.c.claim == claim, claims.c.claimed_at > now() - _LONGEST_PUBLICATION)
    if not c.execute(claims.delete().where(*mine)).rowcount:
        hours = _LONGEST_PUBLICATION.total_seconds() / 3600
        raise ConflictError(f"publishing took more than {hours:g} hours; try again")


def _drop(engine: sa.Engine, claim: str) -> None:
    with writing(engine) as c:
        c.execute(claims.delete().where(claims.c.claim == claim))


def _holding(*, deletes: bool) -> sa.Select[tuple[str]]:
    """Names of claims that have not lapsed."""
    lapses = _DELETION_LAPSES if deletes else _PUBLICATION_LAPSES
    return sa.select(claims.c.name).where(claims.c.deletes.is_(deletes), claims.c.claimed_at > now() - lapses)


def _insert(c: sa.Connection, claim: str, names: Collection[str], *, deletes: bool) -> None:
    c.execute(claims.delete().where(claims.c.claimed_at <= now() - _PUBLICATION_LAPSES))
    common = {"claim": claim, "deletes": deletes, "claimed_at": now()}
    rows = [{"name": name} | common for name in sorted(set(names))]
    if rows:
        c.execute(claims.insert(), rows)
