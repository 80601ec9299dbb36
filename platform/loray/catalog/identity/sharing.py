"""Who sees an adapter, and who has brought its bytes."""

from __future__ import annotations

from collections.abc import Collection

import sqlalchemy as sa

from loray.adapters.manifest import parse_manifest
from loray.catalog.checks import check_tenant
from loray.catalog.database import Database, reading, writing
from loray.catalog.entries import AdapterEntry, without_making
from loray.catalog.queries import count_change, load_entry, lock, log, now, owned, visible
from loray.catalog.schema import adapters, shares, uploads, versions
from loray.errors import NotFoundError, SpecError
from loray.spec import AdapterManifest, Principal, Visibility


class Sharing(Database):
    """The catalog's operations on visibility and uploads."""

    def share(self, name: str, visibility: Visibility, shared_with: Collection[str] = ()) -> AdapterEntry:
        """Set who sees `name` beside its tenant: nobody, the tenants of `shared_with`, or everybody.

        Others see and ask it; only its tenant changes it. Raises AdapterNotFound, PermissionDenied where it is another
        tenant's, and SpecError where `shared_with` is malformed, or does not belong to the visibility.
        """
        if (visibility == "shared") != bool(shared_with):
            raise SpecError("`shared_with` names the tenants of the visibility `shared`, and of no other")
        for tenant in shared_with:
            check_tenant(tenant)
        with writing(self._engine) as c:
            lock(c)
            adapter_id, entry = load_entry(c, self._principal, name, to_change=True)
            wanted = frozenset(shared_with) - {entry.tenant}
            if (visibility, wanted) != (entry.visibility, entry.shared_with):
                c.execute(adapters.update().where(adapters.c.id == adapter_id).values(visibility=visibility))
                c.execute(shares.delete().where(shares.c.adapter_id == adapter_id))
                if wanted:
                    c.execute(shares.insert(), [{"adapter_id": adapter_id, "tenant": tenant} for tenant in wanted])
                detail = {"visibility": visibility, "shared_with": sorted(wanted)}
                log(c, self._actor, "share", entry.name, tenant=entry.tenant, **detail)
                count_change(c, adapter_id)
            return load_entry(c, self._principal, entry.name)[1]

    def note_upload(self, digest: str) -> None:
        """The caller's tenant has brought the bytes of this digest, which it may register from now on."""
        key = {"digest": digest, "tenant": self._principal.tenant}
        where = [uploads.c[column] == value for column, value in key.items()]
        with reading(self._engine) as c:
            if c.execute(sa.select(uploads.c.digest).where(*where)).first() is not None:
                return
        with writing(self._engine) as c:
            lock(c)
            if c.execute(sa.select(uploads.c.digest).where(*where)).first() is None:
                c.execute(uploads.insert().values(key | {"created_at": now()}))

    def check_digest(self, digest: str) -> None:
        """Raise NotFoundError where `register` would not accept the digest from this caller."""
        with reading(self._engine) as c:
            check_digest(c, self._principal, digest)


def check_digest(c: sa.Connection, principal: Principal, digest: str) -> None:
    """Raise NotFoundError unless the caller's tenant has uploaded the digest, or sees it under a name."""
    if principal.is_admin:
        return
    uploaded = _uploaded(principal, digest)
    exists = sa.or_(versions.c.deleted_at.is_(None), owned(principal))  # a deleted version may come back to its owner
    seen = sa.select(versions.c.digest).join(adapters, adapters.c.id == versions.c.adapter_id)
    seen = seen.where(versions.c.digest == digest, visible(principal), exists)
    if c.execute(sa.union_all(uploaded, seen).limit(1)).first() is None:
        raise NotFoundError(f"the store has no adapter with digest {digest[:12]}")


def known_manifest(c: sa.Connection, principal: Principal, digest: str, manifest: AdapterManifest) -> AdapterManifest:
    """What the caller's tenant may know of an adapter that it gives a name of its own: not how it was made, where
    another tenant has made it and shares it.
    """
    if principal.is_admin or c.execute(_uploaded(principal, digest)).first() is not None:
        return manifest
    mine = sa.select(versions.c.manifest).join(adapters, adapters.c.id == versions.c.adapter_id)
    kept = c.execute(mine.where(versions.c.digest == digest, adapters.c.tenant == principal.tenant).limit(1)).scalar()
    if kept is None:
        return without_making(manifest)
    return parse_manifest(kept.encode(), source=f"the manifest of adapter {digest[:12]}")


def _uploaded(principal: Principal, digest: str) -> sa.Select[tuple[str]]:
    return sa.select(uploads.c.digest).where(uploads.c.digest == digest, uploads.c.tenant == principal.tenant)
