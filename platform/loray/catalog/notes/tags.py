"""Tags: keys with values that people give names, as MLflow's. Listings are filtered by them."""

from __future__ import annotations

from collections.abc import Mapping

import sqlalchemy as sa

from loray.catalog.checks import check_tag
from loray.catalog.database import Database, reading, writing
from loray.catalog.queries import load_entry, lock, log
from loray.catalog.schema import tags
from loray.errors import ConflictError, NotFoundError

MAX_TAGS = 100  # of a name


class Tags(Database):
    """The catalog's operations on tags. They do not count as changes, since serving does not depend on them.

    Who sees a name sees its tags, and who may change it sets them. All raise AdapterNotFound.
    """

    def tags(self, name: str) -> Mapping[str, str]:
        """The tags of a name, sorted by key."""
        with reading(self._engine) as c:
            return _of(c, load_entry(c, self._principal, name)[0])

    def set_tag(self, name: str, key: str, value: str) -> bool:
        """Set a tag, or give it another value; whether the name did not have it.

        Raises PermissionDenied for another tenant's name, SpecError for a malformed tag, ConflictError for too many.
        """
        check_tag(key, value)
        with writing(self._engine) as c:
            lock(c)
            adapter_id, entry = load_entry(c, self._principal, name, to_change=True)
            known = _of(c, adapter_id)
            if key not in known and len(known) >= MAX_TAGS:
                raise ConflictError(f"{entry.name!r} has {MAX_TAGS} tags already: delete one of them first")
            if known.get(key) != value:
                c.execute(tags.delete().where(_is(adapter_id, key)))
                c.execute(tags.insert().values(adapter_id=adapter_id, key=key, value=value))
                log(c, self._actor, "set_tag", entry.name, tenant=entry.tenant, key=key, value=value)
            return key not in known

    def delete_tag(self, name: str, key: str) -> None:
        """Raises PermissionDenied for another tenant's name, and NotFoundError where it has no such tag."""
        with writing(self._engine) as c:
            lock(c)
            adapter_id, entry = load_entry(c, self._principal, name, to_change=True)
            if c.execute(tags.delete().where(_is(adapter_id, key))).rowcount == 0:
                known = ", ".join(_of(c, adapter_id)) or "none"
                raise NotFoundError(f"adapter {entry.name!r} has no tag {key!r}; its tags: {known}")
            log(c, self._actor, "delete_tag", entry.name, tenant=entry.tenant, key=key)


def _of(c: sa.Connection, adapter_id: int) -> dict[str, str]:
    rows = c.execute(sa.select(tags.c.key, tags.c.value).where(tags.c.adapter_id == adapter_id))
    return dict(sorted((row.key, row.value) for row in rows))


def _is(adapter_id: int, key: str) -> sa.ColumnElement[bool]:
    return sa.and_(tags.c.adapter_id == adapter_id, tags.c.key == key)
