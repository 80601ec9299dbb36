"""Pages of names, which the database filters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from loray.catalog.queries import visible
from loray.catalog.schema import adapters, bases
from loray.catalog.schema import tags as tags_table
from loray.spec import Principal


def select_names(
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
        of_base = sa.select(bases.c.fingerprint).where(bases.c.name == base)
        query = query.where(adapters.c.served_base == of_base.scalar_subquery())
    if method is not None:
        query = query.where(adapters.c.served_method == method)
    if search:
        query = query.where(adapters.c.name.icontains(search, autoescape=True))
    for key, value in tags.items():
        tagged = sa.select(tags_table.c.adapter_id).where(tags_table.c.key == key)
        query = query.where(adapters.c.id.in_(tagged if value is None else tagged.where(tags_table.c.value == value)))
    return query.order_by(adapters.c.name)
