"""Pages of names, which the database filters, and of one name's versions, whose manifests stay in the database.

A page is read in the order of names from an index that has all columns which are asked: it ends with the last name
wanted, and costs one pass over the names at most that have the tenant, base or method. Which of them a caller sees is
not found by an index: SQLite, which does not know how many names a condition holds for, would sort all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from loray.catalog.entries import AdapterEntry, VersionPage, VersionSummary
from loray.catalog.queries import make_quarantined, utc, visible
from loray.catalog.schema import (
    TAG_START,
    adapters,
    aliases,
    bases,
    evaluations,
    manifest_as_json,
    quarantine,
    versions,
)
from loray.catalog.schema import tags as tags_table
from loray.spec import Evaluation, Principal

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
    """The caller's names after `after`, sorted. `Catalog.names` says what the filters mean."""
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
        query = query.where(_contains(c, search))
    for key, value in tags.items():
        query = query.where(_is_tagged(c, key, value))
    return query.order_by(adapters.c.name)


def _contains(c: sa.Connection, search: str) -> sa.ColumnElement[bool]:
    """Part of the name, in any case. Names are ASCII, whose case SQLite's LIKE ignores by itself."""
    if c.dialect.name == "sqlite":
        return adapters.c.name.contains(search, autoescape=True)
    return adapters.c.name.icontains(search, autoescape=True)


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
) -> VersionPage:
    """`Catalog.versions` of an entry. Two statements, however many versions there are."""
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
    later = _later_evaluations(c, adapter_id, entry.tenant)
    found: list[VersionSummary] = []
    num_evaluations = 0
    with c.execute(query, execution_options={"yield_per": _AT_ONCE}) as rows:
        for row in rows:
            made = _summary(entry.name, row, later.get(row.digest, []))
            num_evaluations += len(made.evaluations)
            if len(found) == limit or (found and num_evaluations > _MOST_EVALUATIONS):
                return VersionPage(tuple(found), found[-1].version)
            found.append(made)
    return VersionPage(tuple(found), None)


_SUMMARY = ("version", "digest", "method", "base_fingerprint", "context_length", "nbytes", "created_at")
_QUARANTINE = [quarantine.c[name] for name in ("deaths", "replica", "died_at", "refused_until")]


def _later_evaluations(c: sa.Connection, adapter_id: int, tenant: str) -> dict[str, list[Evaluation]]:
    """Digest → what was measured after publication, the oldest first."""
    mine = sa.select(versions.c.digest).where(versions.c.adapter_id == adapter_id)
    columns = [evaluations.c[name] for name in Evaluation.model_fields]
    query = sa.select(evaluations.c.digest, *columns).order_by(evaluations.c.id)
    query = query.where(evaluations.c.tenant == tenant, evaluations.c.digest.in_(mine))
    found: dict[str, list[Evaluation]] = {}
    for digest, *fields in c.execute(query):
        found.setdefault(digest, []).append(Evaluation(**dict(zip(Evaluation.model_fields, fields, strict=True))))
    return found


def _summary(name: str, row: sa.Row[Any], later: list[Evaluation]) -> VersionSummary:
    measured = (Evaluation.model_validate(fields) for fields in row.evaluations or ())
    return VersionSummary(
        name=name,
        version=row.version,
        digest=row.digest,
        method=row.method,
        base_fingerprint=row.base_fingerprint,
        context_length=row.context_length,
        nbytes=row.nbytes,
        rank=row.rank,
        data_fingerprint=row.data_fingerprint,
        run=row.job_id or row.sweep,
        created_at=utc(row.created_at),
        aliases=tuple(sorted(row.aliases.split(","))) if row.aliases else (),
        evaluations=(*measured, *later),
        quarantine=None if row.deaths is None else make_quarantined(row),
    )
