"""SQL statements that several operations of the catalog use, inside their transactions."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from pydantic import TypeAdapter, ValidationError

from loray.adapters.manifest import parse_manifest
from loray.catalog.entries import AdapterEntry, AdapterVersion, unknown_adapter
from loray.catalog.schema import adapters, aliases, audit_log, bases, changes, evaluations, versions
from loray.errors import ConflictError, SpecError
from loray.spec import DEFAULT_ALIAS, AdapterRef, Alias, Evaluation, JobId, Name


def lock(c: sa.Connection) -> None:
    """The first statement of every write. On PostgreSQL its row lock makes writers wait for each other, so that rows do
    not change after a writer has read them.
    """
    c.execute(sa.select(changes.c.counter).with_for_update()).scalar_one()


def count_change(c: sa.Connection) -> int:
    """Increment the change counter; returns its new value."""
    counter = c.execute(changes.update().values(counter=changes.c.counter + 1).returning(changes.c.counter))
    return int(counter.scalar_one())


def log(c: sa.Connection, actor: str, action: str, subject: str, **detail: Any) -> None:
    row = {"actor": actor, "action": action, "subject": subject, "detail": json.dumps(detail), "created_at": now()}
    c.execute(audit_log.insert().values(row))


def load_entries(c: sa.Connection, names: Collection[str] | None = None) -> list[tuple[int, AdapterEntry]]:
    """(adapter id, entry) of these names, or of all."""
    where = [] if names is None else [adapters.c.name.in_(names)]
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
    return [
        (row.id, AdapterEntry(row.name, utc(row.created_at), refs[row.id], pointers[row.id]))
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


def load_entry(c: sa.Connection, name: str) -> tuple[int, AdapterEntry]:
    found = load_entries(c, [name])
    if found:
        return found[0]
    names = sorted(c.execute(sa.select(adapters.c.name)).scalars())
    raise unknown_adapter(name, names, c.execute(sa.select(bases.c.name)).scalars().all())


def select_names(after: str, base: str | None, method: str | None) -> sa.Select[Any]:
    """Names after `after`, sorted, whose default version has this `base` (a base model's name) and `method`."""
    aliased = sa.select(aliases.c.version_id).where(alias_is(adapters.c.id, DEFAULT_ALIAS)).scalar_subquery()
    newest = sa.select(versions.c.id).where(versions.c.adapter_id == adapters.c.id)
    newest = newest.order_by(versions.c.version.desc()).limit(1).correlate(adapters)
    default = sa.func.coalesce(aliased, newest.scalar_subquery())
    served = versions.alias("served")
    query = sa.select(adapters.c.name).select_from(adapters).join(served, served.c.id == default)
    query = query.where(adapters.c.name > after)
    if base is not None:
        query = query.join(bases, bases.c.fingerprint == served.c.base_fingerprint).where(bases.c.name == base)
    if method is not None:
        query = query.where(served.c.method == method)
    return query.order_by(adapters.c.name)


def load_version(c: sa.Connection, name: str, adapter_id: int, version: int) -> AdapterVersion:
    row = c.execute(sa.select(versions).where(versions.c.adapter_id == adapter_id, versions.c.version == version)).one()
    pointing = c.execute(sa.select(aliases.c.alias).where(aliases.c.version_id == row.id).order_by(aliases.c.alias))
    return AdapterVersion(
        name=name,
        version=row.version,
        digest=row.digest,
        manifest=parse_manifest(row.manifest.encode(), source=f"the manifest of {name}@{version}"),
        created_at=utc(row.created_at),
        aliases=tuple(pointing.scalars()),
        later_evaluations=load_evaluations(c, row.digest),
    )


def load_evaluations(c: sa.Connection, digest: str) -> tuple[Evaluation, ...]:
    """Evaluations recorded after publication, the oldest first."""
    columns = [evaluations.c[name] for name in Evaluation.model_fields]
    rows = c.execute(sa.select(*columns).where(evaluations.c.digest == digest).order_by(evaluations.c.id))
    return tuple(Evaluation(**row._asdict()) for row in rows)


def version_id_of(c: sa.Connection, adapter_id: int, version: int) -> int:
    where = (versions.c.adapter_id == adapter_id, versions.c.version == version)
    return int(c.execute(sa.select(versions.c.id).where(*where)).scalar_one())


def refuse_base_name(c: sa.Connection, name: str) -> None:
    if c.execute(sa.select(bases.c.name).where(bases.c.name == name)).first():
        raise ConflictError(f"{name!r} is a base model's name; an adapter needs another")


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


def check_name(name: str, what: str = "adapter name") -> None:
    _check(Name, name, what, "letters, digits, '.', '_' and '-', at most 96")


def check_alias(alias: str) -> None:
    _check(Alias, alias, "alias", "a letter, then letters, digits, '_', '-'")


def check_job_id(job_id: str) -> None:
    _check(JobId, job_id, "job id", "letters, digits, '.', '_' and '-', at most 128")


def _check(kind: Any, value: str, what: str, rule: str) -> None:
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as e:
        raise SpecError(f"{value!r} is not a valid {what}: {rule}") from e
