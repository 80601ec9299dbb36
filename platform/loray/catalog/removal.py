"""The catalog's operations that delete and restore, and those that keep in the store what is needed.

A publication claims the names of its objects before it looks at the store, and its registration ends the claim. A
collection claims what it is about to delete, in the transaction in which it finds that neither a version nor a
publication needs it, and ends its claim when the store has answered every deletion. A publication waits while a
collection has one of its names. So each looks at the store, or deletes, after the other has ended or does without the
object, and nobody holds a lock meanwhile.

A claim of a process that was killed lapses. Its process may act on it for a part of that time only: a publication that
takes longer is refused, and a collection ends a batch after seconds.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from time import monotonic, sleep
from typing import Any, NamedTuple

import sqlalchemy as sa

from loray.catalog.audit_chain import log
from loray.catalog.database import Database
from loray.catalog.queries import count_change, load_entry, now, owned, read_counter
from loray.catalog.schema import adapters, alias_moves, bases, claims, jobs, versions
from loray.errors import AdapterNotFound, CatalogError, ConflictError
from loray.spec import has_ended, meanings, split_qualified

Files = Mapping[str, frozenset[str]]  # digest of an adapter → SHA-256 of its files


# -- what the store must keep -----------------------------------------------------------------------------------------


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


def needed_files(c: sa.Connection, keep_deleted_s: float, *, since: int) -> Iterator[tuple[str, frozenset[str]]]:
    """(digest, files) of the needed versions whose names have changed after `since`."""
    oldest = now() - timedelta(seconds=keep_deleted_s)
    query = sa.select(versions.c.digest, versions.c.manifest).join(adapters, adapters.c.id == versions.c.adapter_id)
    for column in (versions.c.deleted_at, adapters.c.deleted_at):
        query = query.where(sa.or_(column.is_(None), column > oldest))
    rows = c.execute(query.where(adapters.c.changed_at > since), execution_options={"yield_per": 500})
    for row in rows:
        yield row.digest, frozenset(json.loads(row.manifest)["files"].values())


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


@dataclass
class Claims:
    """The catalog's operations that order publications and deletions in the store."""

    db: Database

    @contextmanager
    def publishing(self, names: Collection[str]) -> Iterator[str]:
        """Keep the store's objects of these names, SHA-256, from being deleted during a publication.

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
                self._drop(claim)
            raise

    @contextmanager
    def deleting(self, names: Collection[str], before: References, *, keep_deleted_s: float) -> Iterator[Allowed]:
        """Claim a batch of deletions; yield those of `names` that nothing has come to need since `before`. Where the
        block raises, a deletion may still be under way: the claim is kept, and lapses.
        """
        claim = secrets.token_hex(16)
        with self.db.changing() as c:
            until = monotonic() + _BATCH_S
            publications = c.execute(_holding(deletes=False).where(claims.c.name.in_(names))).scalars()
            found = needed_files(c, keep_deleted_s, since=before.counter)
            needed = {name for digest, files in found for name in (digest, *files)} | set(publications)
            free = frozenset(names) - needed
            _insert(c, claim, free, deletes=True)
            log(c, self.db.actor, "collect", "store")
        yield Allowed(free, until)
        self._drop(claim)

    def _drop(self, claim: str) -> None:
        with self.db.writing() as c:
            c.execute(claims.delete().where(claims.c.claim == claim))

    def _claim_to_publish(self, claim: str, names: Collection[str]) -> bool:
        """False where a collection deletes one of the objects."""
        with self.db.changing() as c:
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


# -- delete and restore -----------------------------------------------------------------------------------------------


@dataclass
class Removal:
    """The catalog's operations that delete and restore, and those that say what the store must keep."""

    db: Database

    def delete_version(self, name: str, version: int) -> None:
        """Delete one version. The last version of a name goes with the name alone.

        Raises AdapterNotFound, and ConflictError where an alias points at it, or it is a canary or the last one.
        """
        with self.db.changing() as c:
            adapter_id, entry = load_entry(c, self.db.principal, name, to_change=True)
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
            log(c, self.db.actor, "delete", f"{name}@{version}", tenant=entry.tenant)
            count_change(c, adapter_id)

    def delete_adapter(self, name: str) -> None:
        """Delete a name with all its versions and aliases. Nobody can take it until it is restored.

        Raises AdapterNotFound, and ConflictError while a job trains for it.
        """
        with self.db.changing() as c:
            adapter_id, entry = load_entry(c, self.db.principal, name, to_change=True)
            name = entry.name
            refuse_while_trained(c, entry.tenant, name)
            c.execute(adapters.update().where(adapters.c.id == adapter_id).values(deleted_at=now()))
            log(c, self.db.actor, "delete", name, tenant=entry.tenant)
            count_change(c, adapter_id)

    def deleted_digests(self, name: str, version: int | None = None) -> Sequence[str]:
        """Digests that `restore` of the same arguments needs from the store. Raises AdapterNotFound."""
        with self.db.reading() as c:
            return tuple(row.digest for row in self._deleted(c, name, version))

    def restore(self, name: str, version: int | None = None, *, claim: str | None = None) -> None:
        """Restore a deleted version, or a deleted name as it was. Versions that were deleted before the name stay so.

        `claim` is that of `Claims.publishing`, within which the caller has found their bytes in the store. Raises
        AdapterNotFound where nothing of that name is deleted, and ConflictError where the claim has lapsed.
        """
        with self.db.changing() as c:
            end_claim(c, claim)
            found, *_ = self._deleted(c, name, version)
            if version is None:
                c.execute(adapters.update().where(adapters.c.id == found.adapter_id).values(deleted_at=None))
            else:
                c.execute(versions.update().where(versions.c.id == found.id).values(deleted_at=None))
            subject = found.name if version is None else f"{found.name}@{version}"
            log(c, self.db.actor, "restore", subject, tenant=found.tenant)
            count_change(c, found.adapter_id)

    def _deleted(self, c: sa.Connection, name: str, version: int | None) -> Sequence[sa.Row[Any]]:
        """The versions of one name of the caller that would exist again, at least one."""
        columns = [versions.c[field] for field in ("id", "adapter_id", "digest")]
        query = sa.select(*columns, *(adapters.c[field] for field in ("name", "tenant")))
        query = query.join(adapters, adapters.c.id == versions.c.adapter_id).where(owned(self.db.principal))
        if version is None:
            query = query.where(adapters.c.deleted_at.is_not(None), versions.c.deleted_at.is_(None))
        else:
            is_deleted = (adapters.c.deleted_at.is_(None), versions.c.deleted_at.is_not(None))
            query = query.where(*is_deleted, versions.c.version == version)
        for meant in meanings(name, self.db.principal.tenant):
            found = c.execute(query.where(adapters.c.name == meant).order_by(versions.c.version)).all()
            if found:
                return found
        what = f"adapter {name!r}" if version is None else f"version {version} of adapter {name!r}"
        raise AdapterNotFound(f"no deleted {what}; a deleted name is restored before its versions")

    def references(self, *, keep_deleted_s: float) -> References:
        """The adapters of all versions, without those that were deleted more than `keep_deleted_s` seconds ago."""
        with self.db.reading() as c:
            counter = read_counter(c)
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
        with self.db.reading() as c:
            names = {row.fingerprint: row.name for row in c.execute(sa.select(bases))}
            return tuple(
                StoredUse(tenant, method, names.get(base, base[:12]), names_, versions_, int(deleted), int(nbytes))
                for tenant, method, base, names_, versions_, deleted, nbytes in c.execute(query)
            )


def refuse_deleted(c: sa.Connection, name: str) -> None:
    """Raise ConflictError where the name is deleted."""
    if c.execute(sa.select(adapters.c.deleted_at).where(adapters.c.name == name)).scalar() is not None:
        raise ConflictError(
            f"{name!r} was deleted: restore it (`loray adapters restore {name}`), or choose another name"
        )


def restore_version(c: sa.Connection, adapter_id: int, version: int) -> bool:
    """Restore the version. Returns whether it was deleted."""
    row = (versions.c.adapter_id == adapter_id, versions.c.version == version, versions.c.deleted_at.is_not(None))
    return c.execute(versions.update().where(*row).values(deleted_at=None)).rowcount > 0


def refuse_while_trained(c: sa.Connection, tenant: str, name: str) -> None:
    """Raise ConflictError where a job trains for the tenant's name."""
    mine = (jobs.c.tenant == tenant, jobs.c.name == split_qualified(name).name)
    for row in c.execute(sa.select(jobs.c.id, jobs.c.status).where(*mine)):
        if not has_ended(row.status):
            raise ConflictError(f"job {row.id} trains {name!r}: stop it first")
