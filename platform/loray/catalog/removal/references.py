"""What the catalog needs from the store."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import NamedTuple

import sqlalchemy as sa

from loray.catalog.database import Database, reading
from loray.catalog.queries import now
from loray.catalog.schema import adapters, bases, changes, versions

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

    def references(self, *, keep_deleted_s: float) -> References:
        """The adapters of all versions, without those that were deleted more than `keep_deleted_s` seconds ago."""
        with reading(self._engine) as c:
            counter = int(c.execute(sa.select(changes.c.counter)).scalar_one())
            return References(counter, dict(needed_files(c, keep_deleted_s, since=-1)))

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


def needed_files(c: sa.Connection, keep_deleted_s: float, *, since: int) -> Iterator[tuple[str, frozenset[str]]]:
    """(digest, files) of the needed versions whose names have changed after `since`."""
    oldest = now() - timedelta(seconds=keep_deleted_s)
    query = sa.select(versions.c.digest, versions.c.manifest).join(adapters, adapters.c.id == versions.c.adapter_id)
    for column in (versions.c.deleted_at, adapters.c.deleted_at):
        query = query.where(sa.or_(column.is_(None), column > oldest))
    rows = c.execute(query.where(adapters.c.changed_at > since), execution_options={"yield_per": 500})
    for row in rows:
        yield row.digest, frozenset(json.loads(row.manifest)["files"].values())
