"""SQL statements that several operations of the catalog use, inside their transactions."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from loray.adapters.manifest import parse_manifest
from loray.catalog.checks import check_name, check_qualified
from loray.catalog.entries import AdapterEntry, AdapterVersion, unknown_adapter
from loray.catalog.schema import (
    adapters,
    aliases,
    audit_log,
    bases,
    changes,
    evaluations,
    shares,
    tenants,
    uploads,
    versions,
)
from loray.errors import ConflictError, NotFoundError, PermissionDenied, SpecError
from loray.spec import (
    DEFAULT_ALIAS,
    DEFAULT_TENANT,
    AdapterRef,
    Evaluation,
    Principal,
    meanings,
    qualified_name,
    split_qualified,
)


def lock(c: sa.Connection) -> None:
    """The first statement of every write. On PostgreSQL its row lock makes writers wait for each other, so that rows do
    not change after a writer has read them.
    """
    c.execute(sa.select(changes.c.counter).with_for_update()).scalar_one()


def count_change(c: sa.Connection) -> int:
    """Increment the change counter; returns its new value."""
    counter = c.execute(changes.update().values(counter=changes.c.counter + 1).returning(changes.c.counter))
    return int(counter.scalar_one())


def log(
    c: sa.Connection, actor: str, action: str, subject: str, *, tenant: str = DEFAULT_TENANT, **detail: Any
) -> None:
    """`tenant`: that of the subject."""
    row = {"actor": actor, "action": action, "subject": subject, "detail": json.dumps(detail), "created_at": now()}
    c.execute(audit_log.insert().values(row | {"tenant": tenant}))


def visible(principal: Principal) -> sa.ColumnElement[bool]:
    """The adapters that exist for this caller: every statement that reads names has this condition.

    `AdapterEntry.exists_for` is the same for entries.
    """
    if principal.is_admin:
        return sa.true()
    shared = sa.select(shares.c.adapter_id).where(shares.c.tenant == principal.tenant)
    return sa.or_(
        owned(principal),
        adapters.c.visibility == "public",
        sa.and_(adapters.c.visibility == "shared", adapters.c.id.in_(shared)),
    )


def owned(principal: Principal) -> sa.ColumnElement[bool]:
    """The adapters that this caller may change."""
    return sa.true() if principal.is_admin else adapters.c.tenant == principal.tenant


def load_entries(
    c: sa.Connection, principal: Principal, names: Collection[str] | None = None
) -> list[tuple[int, AdapterEntry]]:
    """(adapter id, entry) of these names, or of all; only those that exist for the caller.

    With whom an adapter is shared is shown to those who may change it.
    """
    where = [visible(principal), *([] if names is None else [adapters.c.name.in_(names)])]
    rows = c.execute(
        sa.select(
            versions.c.adapter_id,
            versions.c.version,
            versions.c.digest,
            versions.c.method,
            versions.c.base_fingerprint,
            versions.c.context_length,
            versions.c.nbytes,
            versions.c.tool_parser,
            versions.c.chat_template,
            adapters.c.name,
        )
        .join(adapters, adapters.c.id == versions.c.adapter_id)
        .where(*where)
    ).all()
    refs: dict[int, dict[int, AdapterRef]] = defaultdict(dict)
    for r in rows:
        refs[r.adapter_id][r.version] = AdapterRef(
            digest=r.digest,
            name=r.name,
            version=r.version,
            method=r.method,
            base_fingerprint=r.base_fingerprint,
            context_length=r.context_length,
            nbytes=r.nbytes,
            tool_parser=r.tool_parser,
            chat_template=r.chat_template,
        )
    pointers: dict[int, dict[str, int]] = defaultdict(dict)
    query = sa.select(aliases.c.adapter_id, aliases.c.alias, versions.c.version)
    query = query.join(versions, versions.c.id == aliases.c.version_id)
    query = query.join(adapters, adapters.c.id == aliases.c.adapter_id)
    for a in c.execute(query.where(*where)):
        pointers[a.adapter_id][a.alias] = a.version
    shared: dict[int, set[str]] = defaultdict(set)
    query = sa.select(shares).join(adapters, adapters.c.id == shares.c.adapter_id)
    for share in c.execute(query.where(*where, owned(principal))):
        shared[share.adapter_id].add(share.tenant)
    return [
        (
            row.id,
            AdapterEntry(
                row.name,
                utc(row.created_at),
                refs[row.id],
                pointers[row.id],
                row.tenant,
                row.visibility,
                frozenset(shared[row.id]) if row.id in shared else frozenset(),
            ),
        )
        for row in c.execute(sa.select(adapters).where(*where))
    ]


def load_templates(c: sa.Connection, known: Mapping[str, str]) -> dict[str, str]:
    """SHA-256 → text of all adapters' chat templates. Those in `known` are not read again."""
    used = c.scalars(sa.select(versions.c.chat_template).where(versions.c.chat_template.is_not(None)).distinct())
    found = {sha256: known.get(sha256) for sha256 in used}
    for sha256 in [sha256 for sha256, text in found.items() if text is None]:
        query = sa.select(versions.c.manifest).where(versions.c.chat_template == sha256).limit(1)
        found[sha256] = json.loads(c.execute(query).scalar_one())["chat_template"]
    return {sha256: text for sha256, text in found.items() if text is not None}


def load_entry(
    c: sa.Connection, principal: Principal, name: str, *, to_change: bool = False
) -> tuple[int, AdapterEntry]:
    """What `name` means for this caller. Raises AdapterNotFound; PermissionDenied `to_change` another tenant's."""
    meant = meanings(name, principal.tenant)
    found = {entry.name: (adapter_id, entry) for adapter_id, entry in load_entries(c, principal, meant)}
    for stored in meant:
        if stored in found:
            adapter_id, entry = found[stored]
            if to_change and not principal.is_admin and entry.tenant != principal.tenant:
                raise PermissionDenied(f"adapter {stored!r} belongs to another tenant, which alone may change it")
            return adapter_id, entry
    names = sorted(c.execute(sa.select(adapters.c.name).where(visible(principal))).scalars())
    raise unknown_adapter(name, names, c.execute(sa.select(bases.c.name)).scalars().all(), principal.tenant)


def name_to_register(c: sa.Connection, principal: Principal, name: str) -> tuple[str, str]:
    """(catalog's name, tenant) of an adapter that this caller may add versions to, whether or not it exists yet.

    Raises as `load_entry` does for a name of another tenant, SpecError for a malformed name or an unknown tenant, and
    ConflictError for a base model's name.
    """
    tenant, bare = split_qualified(name)
    tenant = principal.tenant if tenant is None else tenant
    stored = qualified_name(tenant, bare)
    check_qualified(stored)
    check_name(bare)
    if c.execute(sa.select(bases.c.name).where(bases.c.name == bare)).first():
        raise ConflictError(f"{bare!r} is a base model's name; an adapter needs another")
    if tenant != principal.tenant:
        if not principal.is_admin:
            load_entry(c, principal, name, to_change=True)
        elif c.execute(sa.select(tenants.c.name).where(tenants.c.name == tenant)).first() is None:
            raise SpecError(f"there is no tenant {tenant!r}; create it before its adapters")
    return stored, tenant


def check_digest(c: sa.Connection, principal: Principal, digest: str) -> None:
    """Raise NotFoundError unless the caller's tenant has uploaded the digest, or sees it under a name."""
    if principal.is_admin:
        return
    uploaded = sa.select(uploads.c.digest).where(uploads.c.digest == digest, uploads.c.tenant == principal.tenant)
    seen = sa.select(versions.c.digest).join(adapters, adapters.c.id == versions.c.adapter_id)
    seen = seen.where(versions.c.digest == digest, visible(principal))
    if c.execute(sa.union_all(uploaded, seen).limit(1)).first() is None:
        raise NotFoundError(f"the store has no adapter with digest {digest[:12]}")


def select_names(
    principal: Principal, after: str, *, tenant: str | None, base: str | None, method: str | None
) -> sa.Select[Any]:
    """The caller's names after `after`, sorted: those of `tenant`, whose default version has this `base` (a base
    model's name) and `method`.
    """
    aliased = sa.select(aliases.c.version_id).where(alias_is(adapters.c.id, DEFAULT_ALIAS)).scalar_subquery()
    newest = sa.select(versions.c.id).where(versions.c.adapter_id == adapters.c.id)
    newest = newest.order_by(versions.c.version.desc()).limit(1).correlate(adapters)
    default = sa.func.coalesce(aliased, newest.scalar_subquery())
    served = versions.alias("served")
    query = sa.select(adapters.c.name).select_from(adapters).join(served, served.c.id == default)
    query = query.where(visible(principal), adapters.c.name > after)
    if tenant is not None:
        query = query.where(adapters.c.tenant == tenant)
    if base is not None:
        query = query.join(bases, bases.c.fingerprint == served.c.base_fingerprint).where(bases.c.name == base)
    if method is not None:
        query = query.where(served.c.method == method)
    return query.order_by(adapters.c.name)


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
    )


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
