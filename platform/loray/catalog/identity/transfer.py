"""Handing a name with all its versions to another tenant."""

from __future__ import annotations

import sqlalchemy as sa

from loray.catalog.database import Database, writing
from loray.catalog.entries import AdapterEntry
from loray.catalog.projections import note_projection
from loray.catalog.queries import count_change, load_entry, load_version, lock, log, name_to_register
from loray.catalog.removal.deletion import refuse_deleted, refuse_while_trained
from loray.catalog.schema import adapters, evaluations, shares, versions
from loray.errors import ConflictError, PermissionDenied, SpecError
from loray.spec import split_qualified

_EVALUATION = [column for column in evaluations.c if column.name not in ("id", "tenant")]


class Transfer(Database):
    """The catalog's operation that changes whose a name is."""

    def transfer(self, name: str, tenant: str, new_name: str | None = None) -> AdapterEntry:
        """Make `name` another tenant's, as `new_name` or under the bare name that it has.

        Versions keep numbers and digests; aliases, tags and visibility stay, and so do evaluations. The old name is
        free afterwards. Only an administrator may do it, since it changes what both tenants have.

        Raises AdapterNotFound, PermissionDenied, SpecError where the tenant is unknown or has the name already, and
        ConflictError where the new name is taken or deleted, or a job trains for the old one.
        """
        if not self._principal.is_admin:
            raise PermissionDenied("only an administrator hands an adapter to another tenant")
        with writing(self._engine) as c:
            lock(c)
            adapter_id, entry = load_entry(c, self._principal, name, to_change=True)
            if tenant == entry.tenant:
                raise SpecError(f"adapter {entry.name!r} belongs to tenant {tenant} already")
            bare = split_qualified(entry.name).name if new_name is None else new_name
            stored, _ = name_to_register(c, self._principal, f"{tenant}/{bare}")
            refuse_deleted(c, stored)
            if c.execute(sa.select(adapters.c.id).where(adapters.c.name == stored)).first() is not None:
                raise ConflictError(f"{stored!r} is an adapter already: choose another name for this one")
            refuse_while_trained(c, entry.tenant, entry.name)
            left = entry.shared_with - {tenant}
            visibility = "private" if entry.visibility == "shared" and not left else entry.visibility
            changed = {"name": stored, "tenant": tenant, "visibility": visibility}
            c.execute(adapters.update().where(adapters.c.id == adapter_id).values(changed))
            c.execute(shares.delete().where(shares.c.adapter_id == adapter_id, shares.c.tenant == tenant))
            _take_along(c, adapter_id, stored, entry.tenant, tenant)
            log(c, self._actor, "transfer", entry.name, tenant=entry.tenant, to=stored)
            log(c, self._actor, "transfer", stored, tenant=tenant, of=entry.name)
            count_change(c, adapter_id)
            return load_entry(c, self._principal, f"{tenant}/{split_qualified(stored).name}")[1]


def _take_along(c: sa.Connection, adapter_id: int, name: str, old: str, new: str) -> None:
    """The new tenant has the pairs of the versions, also of deleted ones, and what was measured of them. The old one
    keeps both: it may have the same bytes under another name.
    """
    numbers = c.scalars(sa.select(versions.c.version).where(versions.c.adapter_id == adapter_id)).all()
    found = [load_version(c, name, adapter_id, number) for number in numbers]
    for manifest in (version.manifest for version in found):
        if manifest.projection is not None:
            note_projection(c, new, manifest.base_fingerprint, manifest.projection)
    digests = {version.digest for version in found}

    def of(tenant: str) -> list[dict[str, object]]:
        query = sa.select(*_EVALUATION).where(evaluations.c.digest.in_(digests), evaluations.c.tenant == tenant)
        return [row._asdict() for row in c.execute(query.order_by(evaluations.c.id))]

    known = of(new)
    copied = [row | {"tenant": new} for row in of(old) if row not in known]
    if copied:
        c.execute(evaluations.insert(), copied)
