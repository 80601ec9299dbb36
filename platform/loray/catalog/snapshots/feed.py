"""The change feed: reads what changed since a value of the change counter, in the reader's transaction."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

import sqlalchemy as sa

from loray.catalog.entries import AdapterEntry
from loray.catalog.queries import load_entries
from loray.catalog.schema import adapters, bases, changes, versions
from loray.catalog.snapshots.snapshot import CatalogSnapshot, Changes
from loray.spec import Principal

_LAST_ID = 2**31 - 1  # what the column holds
_PAGE = 500  # adapters that are read at once: drivers hold Python's lock while they make the rows of a result


def changes_since(c: sa.Connection, principal: Principal, before: CatalogSnapshot, *, whole: bool = False) -> Changes:
    """What changed for the caller since the snapshot was taken; all its names where that is empty.

    A row of `adapters` is deleted only long after it was marked as deleted, so no name leaves unseen. `whole` compares
    everything, also with a snapshot of another copy of the catalog.
    """
    found: dict[int, AdapterEntry | None] = dict.fromkeys(before.names) if whole else {}
    for ids in _changed(c, -1 if whole else before.counter):
        entries = dict(load_entries(c, principal, adapters.c.id.in_(ids)))
        for adapter_id in ids:
            entry = entries.get(adapter_id)
            if whole and entry is not None and before.adapter(adapter_id) == entry:
                del found[adapter_id]
            else:
                found[adapter_id] = entry
    return Changes(
        counter=read_counter(c),
        bases={row.name: row.fingerprint for row in c.execute(sa.select(bases))},
        adapters=found,
        templates=_templates(c, before.templates),
    )


def read_counter(c: sa.Connection) -> int:
    return int(c.execute(sa.select(changes.c.counter)).scalar_one())


def _changed(c: sa.Connection, since: int) -> Iterator[list[int]]:
    """Ids of the adapters that changed after `since`, in pages."""
    place = sa.tuple_(adapters.c.changed_at, adapters.c.id)
    query = sa.select(adapters.c.changed_at, adapters.c.id).order_by(adapters.c.changed_at, adapters.c.id).limit(_PAGE)
    last = (since, _LAST_ID)
    while rows := c.execute(query.where(place > sa.tuple_(*last))).all():
        yield [row.id for row in rows]
        last = (rows[-1].changed_at, rows[-1].id)


def _templates(c: sa.Connection, known: Mapping[str, str]) -> Mapping[str, str]:
    """SHA-256 → text of all adapters' chat templates. Those in `known` are not read again."""
    used = c.scalars(sa.select(versions.c.chat_template).where(versions.c.chat_template.is_not(None)).distinct()).all()
    if known.keys() == set(used):
        return known
    found = {sha256: known.get(sha256) for sha256 in used}
    for sha256 in [sha256 for sha256, text in found.items() if text is None]:
        query = sa.select(versions.c.manifest).where(versions.c.chat_template == sha256).limit(1)
        found[sha256] = json.loads(c.execute(query).scalar_one())["chat_template"]
    return {sha256: text for sha256, text in found.items() if text is not None}
