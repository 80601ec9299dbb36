"""Pages of names, which the database filters.

A page is read in the order of names from an index that has all columns which are asked: it ends with the last name
wanted, and costs one pass over the names at most that have the tenant, base or method. Which of them a caller sees is
not found by an index: SQLite, which does not know how many names a condition holds for, would sort all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from loray.catalog.queries import visible
from loray.catalog.schema import TAG_START, adapters, bases
from loray.catalog.schema import tags as tags_table
from loray.spec import Principal

_FEW = 10_000  # adapters with a tag, which are sorted; of more, names are read in order until a page is full


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
