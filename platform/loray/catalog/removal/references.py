"""What the catalog needs from the store, and the order of registrations and of the store's garbage collection.

A batch of deletions in the store runs in a transaction that holds the catalog's write lock. `changes.collections` is
odd from before it until its end, and never the same again. A registration, which holds the same lock, is refused where
`collections` is not what it was when the publisher began to look at the store: it looks again then. So a version is
registered only with bytes that no batch has deleted, and no later batch deletes them. A batch that was killed leaves
an odd number: the next publisher waits for the lock, which nobody holds then, and makes it even.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import sqlalchemy as sa

from loray.catalog.database import Database, reading, writing
from loray.catalog.queries import lock, log, now
from loray.catalog.schema import adapters, bases, changes, versions
from loray.errors import CollectedMeanwhile

Files = Mapping[str, frozenset[str]]  # digest of an adapter → SHA-256 of its files


class References(NamedTuple):
    """Needed adapters; `counter` is the change counter to which they belong."""

    counter: int
    files: Files


class StoredUse(NamedTuple):
    """Versions of one tenant, method and base. `nbytes` counts the tensors of each version."""

    tenant: str
    method: str
    base: str
    num_names: int
    num_versions: int
    num_deleted: int
    nbytes: int


class StoreReferences(Database):
    """The catalog's operations for the store's garbage collection."""

    def collections(self) -> int:
        """A number that no batch of deletions leaves as it is; waits for the end of one. `register` and `restore` take
        it.
        """
        with reading(self._engine) as c:
            found = _collections(c)
        if found % 2 == 0:
            return found
        with writing(self._engine) as c:
            lock(c)
            found = _collections(c)
            return found if found % 2 == 0 else _set_collections(c, found + 1)

    def references(self, *, keep_deleted_s: float) -> References:
        """The adapters of all versions, without those that were deleted more than `keep_deleted_s` seconds ago."""
        with reading(self._engine) as c:
            counter = int(c.execute(sa.select(changes.c.counter)).scalar_one())
            return References(counter, dict(_files(c, keep_deleted_s, since=-1)))

    @contextmanager
    def collecting(self, before: References, *, keep_deleted_s: float) -> Iterator[Files]:
        """Around a batch of deletions: yields what has become needed since `before`. Keep the batch short: nothing else
        can be written meanwhile.
        """
        while True:
            with writing(self._engine) as c:
                lock(c)
                announced = _set_collections(c, (_collections(c) + 1) | 1)
            with writing(self._engine) as c:
                lock(c)
                if _collections(c) != announced:  # a publisher came in between
                    continue
                log(c, self._actor, "collect", "store")
                yield dict(_files(c, keep_deleted_s, since=before.counter))
                _set_collections(c, announced + 1)
                return

    def stored_use(self) -> tuple[StoredUse, ...]:
        """Versions by tenant, method and base, sorted."""
        gone = sa.or_(versions.c.deleted_at.is_not(None), adapters.c.deleted_at.is_not(None))
        group = (adapters.c.tenant, versions.c.method, versions.c.base_fingerprint)
        query = (
            sa.select(
                *group,
                sa.func.count(sa.distinct(adapters.c.id)),
                sa.func.count(),
                sa.func.sum(sa.case((gone, 1), else_=0)),
                sa.func.sum(versions.c.nbytes),
            )
            .join(adapters, adapters.c.id == versions.c.adapter_id)
            .group_by(*group)
            .order_by(*group)
        )
        with reading(self._engine) as c:
            names = {row.fingerprint: row.name for row in c.execute(sa.select(bases))}
            return tuple(
                StoredUse(tenant, method, names.get(base, base[:12]), names_, versions_, int(deleted), int(nbytes))
                for tenant, method, base, names_, versions_, deleted, nbytes in c.execute(query)
            )


def check_collections(c: sa.Connection, collections: int | None) -> None:
    """Raise CollectedMeanwhile where a batch of deletions has run since; within a transaction that holds the lock."""
    if collections not in (None, _collections(c)):
        raise CollectedMeanwhile("the store's garbage collection has run meanwhile; look at the store again")


def _collections(c: sa.Connection) -> int:
    return int(c.execute(sa.select(changes.c.collections)).scalar_one())


def _set_collections(c: sa.Connection, number: int) -> int:
    c.execute(changes.update().values(collections=number))
    return number


def _files(c: sa.Connection, keep_deleted_s: float, *, since: int) -> Iterator[tuple[str, frozenset[str]]]:
    """(digest, files) of the needed versions whose names have changed after `since`."""
    oldest = now() - timedelta(seconds=keep_deleted_s)
    query = sa.select(versions.c.digest, versions.c.manifest).join(adapters, adapters.c.id == versions.c.adapter_id)
    for column in (versions.c.deleted_at, adapters.c.deleted_at):
        query = query.where(sa.or_(column.is_(None), column > oldest))
    rows = c.execute(query.where(adapters.c.changed_at > since), execution_options={"yield_per": 500})
    for row in rows:
        yield row.digest, frozenset(json.loads(row.manifest)["files"].values())
