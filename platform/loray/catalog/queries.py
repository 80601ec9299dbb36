"""SQL statements that several operations of the catalog use, inside their transactions."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from sys import intern
from typing import Any

import sqlalchemy as sa

from loray.adapters.manifest import parse_manifest
from loray.catalog.audit_chain import log as log  # which operations take from here, with the other statements
from loray.catalog.checks import NUM_COMPARED, check_name, check_qualified, unknown_adapter
from loray.catalog.entries import (
    AdapterEntry,
    AdapterVersion,
    Canary,
    Quarantined,
    make_pointers,
    make_ref,
)
from loray.catalog.schema import (
    adapters,
    aliases,
    bases,
    canaries,
    changes,
    evaluations,
    quarantine,
    shares,
    tenants,
    versions,
)
from loray.errors import ConflictError, PermissionDenied, SpecError
from loray.spec import (
    DEFAULT_ALIAS,
    AdapterRef,
    Evaluation,
    Principal,
    meanings,
    qualified_name,
    split_qualified,
)


def lock(c: sa.Connection) -> int:
    """The first statement of every write. On PostgreSQL its row lock makes writers wait for each other, so that rows do
    not change after a writer has read them. Returns the change counter.
    """
    return int(c.execute(sa.select(changes.c.counter).with_for_update()).scalar_one())


def count_change(c: sa.Connection, *adapter_ids: int) -> int:
    """Increment the change counter, and return it: for every write that changed something which servers know.

    It is the last statement of a write to adapters. Of those whose name, versions, aliases or visibility changed, it
    notes the new value, by which snapshots find what changed, and what the bare name means now, by which listings are
    filtered.
    """
    counter = c.execute(changes.update().values(counter=changes.c.counter + 1).returning(changes.c.counter))
    changed_at = int(counter.scalar_one())
    if adapter_ids:
        c.execute(
            adapters.update()
            .where(adapters.c.id.in_(adapter_ids))
            .values(changed_at=changed_at, served_method=_served("method"), served_base=_served("base_fingerprint"))
        )
    return changed_at


def _served(column: str) -> sa.ScalarSelect[Any]:
    """A column of the version that an adapter's bare name means; null where no version is left."""
    is_default = sa.and_(alias_is(versions.c.adapter_id, DEFAULT_ALIAS), aliases.c.version_id == versions.c.id)
    query = sa.select(versions.c[column]).outerjoin(aliases, is_default)
    query = query.where(versions.c.adapter_id == adapters.c.id, versions.c.deleted_at.is_(None))
    query = query.order_by(aliases.c.version_id.is_(None), versions.c.version.desc()).limit(1)
    return query.correlate(adapters).scalar_subquery()


def visible(principal: Principal) -> sa.ColumnElement[bool]:
    """The adapters that exist for this caller: every statement that reads names has this condition.

    `AdapterEntry.exists_for` is the same for entries.
    """
    exists: sa.ColumnElement[bool] = adapters.c.deleted_at.is_(None)
    if principal.names is not None:
        exists = sa.and_(exists, adapters.c.name.in_(sorted(principal.names)))
    if principal.is_admin:
        return exists
    is_shared = sa.exists().where(shares.c.adapter_id == adapters.c.id, shares.c.tenant == principal.tenant)
    seen = sa.or_(
        owned(principal),
        adapters.c.visibility == "public",
        sa.and_(adapters.c.visibility == "shared", is_shared.correlate(adapters)),
    )
    return sa.and_(exists, seen)


def owned(principal: Principal) -> sa.ColumnElement[bool]:
    """The adapters that this caller may change."""
    mine = sa.true() if principal.is_admin else adapters.c.tenant == principal.tenant
    return mine if principal.names is None else sa.and_(mine, adapters.c.name.in_(sorted(principal.names)))


def load_entries(
    c: sa.Connection, principal: Principal, *where: sa.ColumnElement[bool]
) -> list[tuple[int, AdapterEntry]]:
    """(adapter id, entry) of the adapters that exist for the caller, and for which the conditions on `adapters` hold.

    With whom an adapter is shared is shown to those who may change it.
    """
    chosen = c.execute(sa.select(*_ENTRY).where(visible(principal), *where)).all()
    if not chosen:
        return []
    ids = [row.id for row in chosen]
    names = {row.id: row.name for row in chosen}
    refs: dict[int, list[AdapterRef]] = defaultdict(list)
    for adapter_id, *fields in c.execute(_REFS, {"ids": ids}):
        refs[adapter_id].append(make_ref(names[adapter_id], *fields))
    pointers: dict[int, list[tuple[str, int]]] = defaultdict(list)
    for adapter_id, alias, version in c.execute(_POINTERS, {"ids": ids}):
        pointers[adapter_id].append((alias, version))
    running = load_canaries(c, *ids)
    shared_with: dict[int, set[str]] = defaultdict(set)
    for adapter_id, tenant in c.execute(_SHARES.where(owned(principal)), {"ids": ids}):
        shared_with[adapter_id].add(intern(tenant))
    return [
        (
            row.id,
            AdapterEntry(
                row.name,
                utc(row.created_at),
                tuple(refs[row.id]),
                make_pointers(pointers.get(row.id, ())),
                intern(row.tenant),
                row.visibility,
                frozenset(shared_with.get(row.id, ())),
                tuple(running.get(row.id, ())),
            ),
        )
        for row in chosen
        if row.id in refs
    ]


_ENTRY = [adapters.c[name] for name in ("id", "name", "created_at", "tenant", "visibility")]
_IDS: sa.BindParameter[Any] = sa.bindparam("ids", expanding=True)
_REF = ("version", "digest", "context_length", "nbytes", "method", "base_fingerprint", "tool_parser", "chat_template")
_REFS = (
    sa.select(versions.c.adapter_id, *(versions.c[name] for name in _REF))
    .where(versions.c.adapter_id.in_(_IDS), versions.c.deleted_at.is_(None))
    .order_by(versions.c.adapter_id, versions.c.version)
)
_POINTERS = (
    sa.select(aliases.c.adapter_id, aliases.c.alias, versions.c.version)
    .join(versions, versions.c.id == aliases.c.version_id)
    .where(aliases.c.adapter_id.in_(_IDS), versions.c.deleted_at.is_(None))
    .order_by(aliases.c.adapter_id, aliases.c.alias)
)
_CANARIES = (
    sa.select(canaries.c.adapter_id, canaries.c.alias, versions.c.version, canaries.c.percent, canaries.c.id)
    .join(versions, versions.c.id == canaries.c.version_id)
    .join(aliases, (aliases.c.adapter_id == canaries.c.adapter_id) & (aliases.c.alias == canaries.c.alias))
    .where(canaries.c.adapter_id.in_(_IDS), canaries.c.ended_at.is_(None))
    # An older loray beside this one moves and deletes aliases, and deletes versions, without ending their canaries.
    .where(aliases.c.version_id == canaries.c.stable_id, versions.c.deleted_at.is_(None))
    .order_by(canaries.c.adapter_id, canaries.c.alias)
)
_SHARES = (
    sa.select(shares.c.adapter_id, shares.c.tenant)
    .join(adapters, adapters.c.id == shares.c.adapter_id)
    .where(shares.c.adapter_id.in_(_IDS))
)


def load_canaries(c: sa.Connection, *adapter_ids: int) -> dict[int, list[Canary]]:
    """Adapter id → its running canaries, sorted by alias."""
    found: dict[int, list[Canary]] = defaultdict(list)
    for adapter_id, *fields in c.execute(_CANARIES, {"ids": adapter_ids}):
        found[adapter_id].append(Canary(*fields))
    return found


def load_entry(
    c: sa.Connection, principal: Principal, name: str, *, to_change: bool = False
) -> tuple[int, AdapterEntry]:
    """What `name` means for this caller. Raises AdapterNotFound; PermissionDenied `to_change` another tenant's."""
    meant = meanings(name, principal.tenant)
    found = {
        entry.name: (adapter_id, entry) for adapter_id, entry in load_entries(c, principal, adapters.c.name.in_(meant))
    }
    for stored in meant:
        if stored in found:
            adapter_id, entry = found[stored]
            if to_change and not principal.is_admin and entry.tenant != principal.tenant:
                raise PermissionDenied(f"adapter {stored!r} belongs to another tenant, which alone may change it")
            return adapter_id, entry
    near = {stored: _beside(c, principal, stored) for stored in meant}
    raise unknown_adapter(name, near, c.execute(sa.select(bases.c.name)).scalars().all())


def _beside(c: sa.Connection, principal: Principal, name: str) -> list[str]:
    """The names beside the place of `name` in the order of all, of which those that exist for the caller."""
    name_of, each = adapters.c.name, NUM_COMPARED // 2
    nearest = sa.union_all(
        sa.select(sa.select(name_of).where(name_of < name).order_by(name_of.desc()).limit(each).subquery().c.name),
        sa.select(sa.select(name_of).where(name_of > name).order_by(name_of).limit(each).subquery().c.name),
    )
    return list(c.scalars(sa.select(name_of).where(name_of.in_(nearest), visible(principal)).order_by(name_of)))


def name_to_register(c: sa.Connection, principal: Principal, name: str) -> tuple[str, str]:
    """(catalog's name, tenant) of an adapter that this caller may add versions to, whether or not it exists yet.

    Raises as `load_entry` does for a name of another tenant, PermissionDenied for one that the caller's key is not for,
    SpecError for a malformed name or an unknown tenant, and ConflictError for a base model's name.
    """
    tenant, bare = split_qualified(name)
    tenant = principal.tenant if tenant is None else tenant
    stored = qualified_name(tenant, bare)
    check_qualified(stored)
    check_name(bare)
    if principal.names is not None and stored not in principal.names:
        raise PermissionDenied("this key is for other models; GET /api/v1/keys/self says for which")
    if c.execute(sa.select(bases.c.name).where(bases.c.name == bare)).first():
        raise ConflictError(f"{bare!r} is a base model's name; an adapter needs another")
    if tenant != principal.tenant:
        if not principal.is_admin:
            load_entry(c, principal, name, to_change=True)
        elif c.execute(sa.select(tenants.c.name).where(tenants.c.name == tenant)).first() is None:
            raise SpecError(f"there is no tenant {tenant!r}; create it before its adapters")
    return stored, tenant


def load_version(c: sa.Connection, name: str, adapter_id: int, version: int) -> AdapterVersion:
    query = sa.select(versions, adapters.c.tenant).join(adapters, adapters.c.id == versions.c.adapter_id)
    row = c.execute(query.where(adapters.c.id == adapter_id, versions.c.version == version)).one()
    pointing = c.execute(sa.select(aliases.c.alias).where(aliases.c.version_id == row.id).order_by(aliases.c.alias))
    return AdapterVersion(
        name=name,
        version=row.version,
        digest=row.digest,
        manifest=parse_manifest(row.manifest.encode(), source=f"the manifest of {name}@{version}"),
        created_at=utc(row.created_at),
        aliases=tuple(pointing.scalars()),
        later_evaluations=load_evaluations(c, row.tenant, row.digest),
        quarantine=_quarantine_of(c, row.digest),
    )


def _quarantine_of(c: sa.Connection, digest: str) -> Quarantined | None:
    row = c.execute(sa.select(quarantine).where(quarantine.c.digest == digest)).first()
    return None if row is None else make_quarantined(row)


def make_quarantined(row: sa.Row[Any]) -> Quarantined:
    until = row.refused_until
    return Quarantined(row.deaths, row.replica, utc(row.died_at), None if until is None else utc(until))


def load_evaluations(c: sa.Connection, tenant: str, digest: str) -> tuple[Evaluation, ...]:
    """Evaluations that were recorded after publication for the adapter of this tenant, the oldest first."""
    columns = [evaluations.c[name] for name in Evaluation.model_fields]
    where = (evaluations.c.digest == digest, evaluations.c.tenant == tenant)
    rows = c.execute(sa.select(*columns).where(*where).order_by(evaluations.c.id))
    return tuple(Evaluation(**row._asdict()) for row in rows)


def version_id_of(c: sa.Connection, adapter_id: int, version: int) -> int:
    where = (versions.c.adapter_id == adapter_id, versions.c.version == version)
    return int(c.execute(sa.select(versions.c.id).where(*where)).scalar_one())


def alias_is(adapter_id: int | sa.Column[int], alias: str) -> sa.ColumnElement[bool]:
    return sa.and_(aliases.c.adapter_id == adapter_id, aliases.c.alias == alias)


def new_id(inserted: sa.CursorResult[Any]) -> int:
    key = inserted.inserted_primary_key
    assert key is not None
    return int(key[0])


def now() -> datetime:
    return datetime.now(UTC)


def utc(value: datetime) -> datetime:
    """`value` with its time zone, UTC, which SQLite does not store."""
    return value if value.tzinfo else value.replace(tzinfo=UTC)
