"""Deletion of names and versions. What is deleted does not exist for anybody, but can be restored while its bytes are
in the store. Numbers of versions are never used again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import sqlalchemy as sa

from loray.catalog.database import Database, writing
from loray.catalog.queries import count_change, load_entry, lock, log, now, owned
from loray.catalog.removal.claims import end_claim
from loray.catalog.schema import adapters, alias_moves, jobs, versions
from loray.errors import AdapterNotFound, ConflictError
from loray.spec import has_ended, meanings, split_qualified


class _Deleted(NamedTuple):
    id: int
    adapter_id: int
    digest: str
    version: int
    name: str
    tenant: str


class Deletion(Database):
    """The catalog's operations that delete and restore."""

    def delete_version(self, name: str, version: int) -> None:
        """Delete one version. The last version of a name goes with the name alone.

        Raises AdapterNotFound, and ConflictError where an alias points at it, or it is a canary or the last one.
        """
        with writing(self._engine) as c:
            lock(c)
            adapter_id, entry = load_entry(c, self._principal, name, to_change=True)
            name = entry.name
            entry.select(str(version))
            pointing = sorted(alias for alias, target in entry.aliases.items() if target == version)
            if pointing:
                raise ConflictError(
                    f"{name}@{version} is what {', '.join(pointing)} points at: move or delete the alias first"
                )
            if any(canary.version == version for canary in entry.canaries):
                raise ConflictError(f"{name}@{version} is a canary: end it first")
            if len(entry.versions) == 1:
                raise ConflictError(f"{name}@{version} is the only version of {name!r}: delete the name instead")
            row = sa.and_(versions.c.adapter_id == adapter_id, versions.c.version == version)
            c.execute(versions.update().where(row).values(deleted_at=now()))
            target = sa.select(versions.c.id).where(row).scalar_subquery()
            c.execute(alias_moves.update().where(alias_moves.c.version_id == target).values(undone=True))
            log(c, self._actor, "delete", f"{name}@{version}", tenant=entry.tenant)
            count_change(c, adapter_id)

    def delete_adapter(self, name: str) -> None:
        """Delete a name with all its versions and aliases. Nobody can take it until it is restored.

        Raises AdapterNotFound, and ConflictError while a job trains for it.
        """
        with writing(self._engine) as c:
            lock(c)
            adapter_id, entry = load_entry(c, self._principal, name, to_change=True)
            name = entry.name
            refuse_while_trained(c, entry.tenant, name)
            c.execute(adapters.update().where(adapters.c.id == adapter_id).values(deleted_at=now()))
            log(c, self._actor, "delete", name, tenant=entry.tenant)
            count_change(c, adapter_id)

    def deleted_digests(self, name: str, version: int | None = None) -> Sequence[str]:
        """Digests that `restore` of the same arguments needs from the store. Raises AdapterNotFound."""
        with writing(self._engine) as c:
            return tuple(row.digest for row in self._deleted(c, name, version))

    def restore(self, name: str, version: int | None = None, *, claim: str | None = None) -> None:
        """Restore a deleted version, or a deleted name as it was. Versions that were deleted before the name stay so.

        `claim` is that of `publishing`, within which the caller has found their bytes in the store. Raises
        AdapterNotFound where nothing of that name is deleted, and ConflictError where the claim has lapsed.
        """
        with writing(self._engine) as c:
            lock(c)
            end_claim(c, claim)
            found = self._deleted(c, name, version)
            adapter_id = found[0].adapter_id
            if version is None:
                c.execute(adapters.update().where(adapters.c.id == adapter_id).values(deleted_at=None))
            else:
                c.execute(versions.update().where(versions.c.id == found[0].id).values(deleted_at=None))
            stored = found[0].name
            subject = stored if version is None else f"{stored}@{version}"
            log(c, self._actor, "restore", subject, tenant=found[0].tenant)
            count_change(c, adapter_id)

    def _deleted(self, c: sa.Connection, name: str, version: int | None) -> list[_Deleted]:
        """The versions of one name of the caller that would exist again, at least one."""
        columns = [versions.c[field] for field in ("id", "adapter_id", "digest", "version")]
        query = sa.select(*columns, *(adapters.c[field] for field in ("name", "tenant")))
        query = query.join(adapters, adapters.c.id == versions.c.adapter_id).where(owned(self._principal))
        if version is None:
            query = query.where(adapters.c.deleted_at.is_not(None), versions.c.deleted_at.is_(None))
        else:
            is_deleted = (adapters.c.deleted_at.is_(None), versions.c.deleted_at.is_not(None))
            query = query.where(*is_deleted, versions.c.version == version)
        for meant in meanings(name, self._principal.tenant):
            found = c.execute(query.where(adapters.c.name == meant).order_by(versions.c.version)).all()
            if found:
                return [_Deleted(*row) for row in found]
        what = f"adapter {name!r}" if version is None else f"version {version} of adapter {name!r}"
        raise AdapterNotFound(f"no deleted {what}; a deleted name is restored before its versions")


def refuse_deleted(c: sa.Connection, name: str) -> None:
    """Raise ConflictError where the name is deleted."""
    if c.execute(sa.select(adapters.c.deleted_at).where(adapters.c.name == name)).scalar() is not None:
        raise ConflictError(
            f"{name!r} was deleted: restore it (`loray adapters restore {name}`), or choose another name"
        )


def restore_version(c: sa.Connection, adapter_id: int, version: int) -> bool:
    """Whether the version was deleted; it exists again."""
    row = (versions.c.adapter_id == adapter_id, versions.c.version == version, versions.c.deleted_at.is_not(None))
    return c.execute(versions.update().where(*row).values(deleted_at=None)).rowcount > 0


def refuse_while_trained(c: sa.Connection, tenant: str, name: str) -> None:
    """Raise ConflictError where a job trains for the tenant's name."""
    mine = (jobs.c.tenant == tenant, jobs.c.name == split_qualified(name).name)
    for row in c.execute(sa.select(jobs.c.id, jobs.c.status).where(*mine)):
        if not has_ended(row.status):
            raise ConflictError(f"job {row.id} trains {name!r}: stop it first")
