"""SQL statements that several parts of the catalog share."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from sys import intern
from typing import Any

import sqlalchemy as sa

from loray.adapters.manifest import parse_manifest
from loray.catalog.entries import (
    NUM_COMPARED,
    AdapterEntry,
    AdapterVersion,
    Canary,
    Quarantined,
    VersionSummary,
    check_name,
    check_qualified,
    make_pointers,
    make_ref,
    unknown_adapter,
)
from loray.catalog.schema import (
    TAG_START,
    adapters,
    aliases,
    bases,
    canaries,
    changes,
    evaluations,
    manifest_as_json,
    quarantine,
    shares,
    tenants,
    versions,
)
from loray.catalog.schema import tags as tags_table
from loray.errors import ConflictError, PermissionDenied, SpecError
from loray.schemas.resources import Page
from loray.spec import (
    DEFAULT_ALIAS,
    AdapterRef,
    Evaluation,
    Principal,
    meanings,
    qualified_name,
    split_qualified,
)


def read_counter(c: sa.Connection) -> int:
    """The change counter."""
    return int(c.execute(sa.select(changes.c.counter)).scalar_one())


def next_revision(c: sa.Connection) -> int:
    """The value of the change counter after this write, which has the catalog's lock."""
    return read_counter(c) + 1


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
    for adapter_id, *fields, invoked_by in c.execute(_refs(c), {"ids": ids}):
        refs[adapter_id].append(make_ref(names[adapter_id], *fields, invoked_by=invoked_by))
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
                row.created_at,
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
REF = ("version", "digest", "context_length", "nbytes", "method", "base_fingerprint", "tool_parser", "chat_template")


def _refs(c: sa.Connection) -> sa.Select[Any]:
    """Select the references, aLoRA's with the invocation that its manifest has: others' manifests are not read."""
    invoked = sa.case((versions.c.method == "alora", manifest_as_json(c)["invocation_tokens"]))
    return (
        sa.select(versions.c.adapter_id, *(versions.c[name] for name in REF), invoked)
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
    .where(canaries.c.adapter_id.in_(_IDS), canaries.c.ended_at.is_(None))
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
    """The adapter that `name` means for this caller, as (adapter id, entry). Raises AdapterNotFound; PermissionDenied
    `to_change` another tenant's.
    """
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
    died = c.execute(sa.select(quarantine).where(quarantine.c.digest == row.digest)).first()
    later = load_evaluations(c, row.tenant, [row.digest])
    manifest = parse_manifest(row.manifest.encode(), source=f"the manifest of {name}@{version}")
    return AdapterVersion(
        name=name,
        version=row.version,
        digest=row.digest,
        created_at=row.created_at,
        aliases=tuple(pointing.scalars()),
        method=manifest.method,
        base_fingerprint=manifest.base_fingerprint,
        context_length=manifest.context_length,
        nbytes=manifest.nbytes,
        evaluations=(*manifest.evaluations, *later.get(row.digest, ())),
        quarantine=None if died is None else make_quarantined(died),
        manifest=manifest,
    )


def make_quarantined(row: sa.Row[Any]) -> Quarantined:
    fields = ("deaths", "replica", "died_at", "refused_until")
    return Quarantined(**{name: getattr(row, name) for name in fields})


def load_evaluations(
    c: sa.Connection, tenant: str, digests: Sequence[str] | sa.Select[tuple[str]]
) -> dict[str, list[Evaluation]]:
    """Digest → what was measured of the tenant's adapter after publication, the oldest first."""
    columns = [evaluations.c[name] for name in Evaluation.model_fields]
    query = sa.select(evaluations.c.digest, *columns).order_by(evaluations.c.id)
    query = query.where(evaluations.c.tenant == tenant, evaluations.c.digest.in_(digests))
    found: dict[str, list[Evaluation]] = {}
    for digest, *fields in c.execute(query):
        found.setdefault(digest, []).append(Evaluation(**dict(zip(Evaluation.model_fields, fields, strict=True))))
    return found


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


def beyond(
    c: sa.Connection, table: sa.Table, mine: sa.ColumnElement[bool], row_id: str, *, is_ascending: bool = False
) -> sa.ColumnElement[bool] | None:
    """The rows that are older than the caller's row of this id, or `is_ascending` newer. None: the caller has none."""
    last = c.execute(sa.select(table.c.created_at, table.c.id).where(mine, table.c.id == row_id)).first()
    if last is None:
        return None
    place = sa.tuple_(table.c.created_at, table.c.id)
    bound = sa.tuple_(sa.literal(last.created_at, table.c.created_at.type), last.id)
    return place > bound if is_ascending else place < bound


def newest(
    c: sa.Connection,
    table: sa.Table,
    mine: sa.ColumnElement[bool],
    wanted: Mapping[str, Any],
    cursor: str | None,
    limit: int,
) -> tuple[Sequence[sa.Row[Any]], str | None]:
    """(rows, cursor of the next page): at most `limit` of the caller's rows, newest first, after the id `cursor`.

    wanted  column → value; None: any

    Raises SpecError where the caller has no row of this id.
    """
    query = sa.select(table).where(mine, *(table.c[name] == v for name, v in wanted.items() if v is not None))
    if cursor is not None:
        if (older := beyond(c, table, mine, cursor)) is None:
            raise SpecError(f"{cursor!r} is no cursor; take `next` from the page before")
        query = query.where(older)
    rows = c.execute(query.order_by(table.c.created_at.desc(), table.c.id.desc()).limit(limit + 1)).all()
    return rows[:limit], rows[limit - 1].id if len(rows) > limit else None


# -- listings ---------------------------------------------------------------------------------------------------------

_FEW = 10_000  # adapters with a tag, which are sorted; of more, names are read in order until a page is full
_MOST_EVALUATIONS = 4096  # of a page, after which it ends
_AT_ONCE = 50  # rows in memory


def select_names(
    c: sa.Connection,
    principal: Principal,
    after: str,
    *,
    tenant: str | None,
    base: str | None,
    method: str | None,
    search: str | None,
    tags: Mapping[str, str | None],
) -> sa.Select[Any]:
    """The caller's names after `after`, sorted. `Adapters.page` says what the filters mean.

    A page is read in the order of names from an index that has all columns which are asked: it ends with the last name
    wanted, and costs one pass over the names at most that have the tenant, base or method. Which of them a caller sees
    is not found by an index: SQLite, which does not know how many names a condition holds for, would sort all of them.
    """
    query = sa.select(adapters.c.name).where(visible(principal), adapters.c.served_base.is_not(None))
    query = query.where(adapters.c.name > after)
    if tenant is not None:
        query = query.where(adapters.c.tenant == tenant)
    if base is not None:
        fingerprint = c.execute(sa.select(bases.c.fingerprint).where(bases.c.name == base)).scalar()
        query = query.where(sa.false() if fingerprint is None else adapters.c.served_base == fingerprint)
    if method is not None:
        query = query.where(adapters.c.served_method == method)
    if search:
        # Names are ASCII, whose case SQLite's LIKE ignores by itself.
        contains = adapters.c.name.contains if c.dialect.name == "sqlite" else adapters.c.name.icontains
        query = query.where(contains(search, autoescape=True))
    for key, value in tags.items():
        query = query.where(_is_tagged(c, key, value))
    return query.order_by(adapters.c.name)


def _is_tagged(c: sa.Connection, key: str, value: str | None) -> sa.ColumnElement[bool]:
    wanted = [tags_table.c.key == key]
    if value is not None:
        wanted.append(tags_table.c.value_start == value[:TAG_START])
    if value is not None and len(value) >= TAG_START:
        wanted.append(tags_table.c.value == value)
    tagged = sa.select(tags_table.c.adapter_id).where(*wanted)
    found = sa.select(sa.func.count()).select_from(tagged.limit(_FEW + 1).subquery())
    if c.execute(found).scalar_one() <= _FEW:
        return adapters.c.id.in_(tagged)
    return tagged.where(tags_table.c.adapter_id == adapters.c.id).correlate(adapters).exists()


def list_versions(
    c: sa.Connection, adapter_id: int, entry: AdapterEntry, limit: int, before: int | None
) -> Page[VersionSummary]:
    """`Adapters.versions` of an entry. Two statements, however many versions there are."""
    manifest = manifest_as_json(c)
    texts = (manifest[name].as_string().label(name) for name in ("data_fingerprint", "job_id", "sweep"))
    of_manifest = (manifest["evaluations"].label("evaluations"), manifest["rank"].as_integer().label("rank"), *texts)
    pointing = sa.select(sa.func.aggregate_strings(aliases.c.alias, ","))
    pointing = pointing.where(aliases.c.version_id == versions.c.id).correlate(versions)
    columns = [*(versions.c[name] for name in _SUMMARY), *of_manifest, *_QUARANTINE]
    query: sa.Select[Any] = sa.select(*columns, pointing.scalar_subquery().label("aliases"))
    query = query.outerjoin(quarantine, quarantine.c.digest == versions.c.digest)
    query = query.where(versions.c.adapter_id == adapter_id, versions.c.deleted_at.is_(None))
    if before is not None:
        query = query.where(versions.c.version < before)
    query = query.order_by(versions.c.version.desc()).limit(limit + 1)
    digests = sa.select(versions.c.digest).where(versions.c.adapter_id == adapter_id)
    later = load_evaluations(c, entry.tenant, digests)
    found: list[VersionSummary] = []
    num_evaluations = 0
    with c.execute(query, execution_options={"yield_per": _AT_ONCE}) as rows:
        for row in rows:
            made = _summary(entry.name, row, later.get(row.digest, []))
            num_evaluations += len(made.evaluations)
            if len(found) == limit or (found and num_evaluations > _MOST_EVALUATIONS):
                return Page(items=tuple(found), next=str(found[-1].version))
            found.append(made)
    return Page(items=tuple(found))


_SUMMARY = ("version", "digest", "method", "base_fingerprint", "context_length", "nbytes", "created_at")
_QUARANTINE = [quarantine.c[name] for name in ("deaths", "replica", "died_at", "refused_until")]


def _summary(name: str, row: sa.Row[Any], later: list[Evaluation]) -> VersionSummary:
    measured = (Evaluation.model_validate(fields) for fields in row.evaluations or ())
    made = {
        "name": name,
        "run": row.job_id or row.sweep,
        "aliases": tuple(sorted(row.aliases.split(","))) if row.aliases else (),
        "evaluations": (*measured, *later),
        "quarantine": None if row.deaths is None else make_quarantined(row),
    }
    return VersionSummary(**row._asdict() | made)
