"""The catalog's operations on names and what belongs to them: tags, evaluations, VeRA's pairs, who sees a name, whose
it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import sqlalchemy as sa

from loray.adapters.manifest import parse_manifest
from loray.catalog.audit_chain import log
from loray.catalog.database import Database, reading, writing
from loray.catalog.entries import AdapterEntry, AdapterVersion, check_tag, check_tenant, without_making
from loray.catalog.queries import (
    count_change,
    load_entry,
    load_evaluations,
    load_version,
    lock,
    name_to_register,
    now,
    owned,
    visible,
)
from loray.catalog.removal import refuse_deleted, refuse_while_trained
from loray.catalog.schema import adapters, evaluations, projections, shares, tags, uploads, versions
from loray.errors import AdapterNotFound, ConflictError, NotFoundError, PermissionDenied, SpecError
from loray.spec import (
    DEFAULT_TENANT,
    DTYPE_BYTES,
    AdapterManifest,
    Evaluation,
    Principal,
    Projection,
    Visibility,
    split_qualified,
)

MAX_TAGS = 100  # of a name


class Tags(Database):
    """The catalog's operations on tags. They do not count as changes, since serving does not depend on them.

    Who sees a name sees its tags, and who may change it sets them. All raise AdapterNotFound.
    """

    def tags(self, name: str) -> Mapping[str, str]:
        """The tags of a name, sorted by key."""
        with reading(self._engine) as c:
            return _tags_of(c, load_entry(c, self._principal, name)[0])

    def set_tag(self, name: str, key: str, value: str) -> bool:
        """Set a tag, or give it another value. Returns whether the name did not have it.

        Raises PermissionDenied for another tenant's name, SpecError for a malformed tag, ConflictError for too many.
        """
        check_tag(key, value)
        with writing(self._engine) as c:
            lock(c)
            adapter_id, entry = load_entry(c, self._principal, name, to_change=True)
            known = _tags_of(c, adapter_id)
            if key not in known and len(known) >= MAX_TAGS:
                raise ConflictError(f"{entry.name!r} has {MAX_TAGS} tags already: delete one of them first")
            if known.get(key) != value:
                c.execute(tags.delete().where(_tag_is(adapter_id, key)))
                c.execute(tags.insert().values(adapter_id=adapter_id, key=key, value=value))
                log(c, self._actor, "set_tag", entry.name, tenant=entry.tenant, key=key, value=value)
            return key not in known

    def delete_tag(self, name: str, key: str) -> None:
        """Delete a tag. Raises PermissionDenied for another tenant's name, NotFoundError where it has no such tag."""
        with writing(self._engine) as c:
            lock(c)
            adapter_id, entry = load_entry(c, self._principal, name, to_change=True)
            if c.execute(tags.delete().where(_tag_is(adapter_id, key))).rowcount == 0:
                known = ", ".join(_tags_of(c, adapter_id)) or "none"
                raise NotFoundError(f"adapter {entry.name!r} has no tag {key!r}; its tags: {known}")
            log(c, self._actor, "delete_tag", entry.name, tenant=entry.tenant, key=key)


def _tags_of(c: sa.Connection, adapter_id: int) -> dict[str, str]:
    rows = c.execute(sa.select(tags.c.key, tags.c.value).where(tags.c.adapter_id == adapter_id))
    return dict(sorted((row.key, row.value) for row in rows))


def _tag_is(adapter_id: int, key: str) -> sa.ColumnElement[bool]:
    return sa.and_(tags.c.adapter_id == adapter_id, tags.c.key == key)


MAX_REPORTED = 1024  # evaluations of an adapter


class Evaluations(Database):
    """The catalog's operations on evaluations. They do not count as changes, since serving does not depend on them."""

    def record_evaluations(self, digest: str, measured: Sequence[Evaluation]) -> None:
        """Record evaluations of the adapter, for each tenant that has it and whose adapters the caller may change.

        Raises AdapterNotFound where there is none.
        """
        with writing(self._engine) as c:
            lock(c)
            query = sa.select(adapters.c.tenant).join(versions, versions.c.adapter_id == adapters.c.id)
            query = query.where(versions.c.digest == digest, owned(self._principal))
            tenants = c.scalars(query.distinct().order_by(adapters.c.tenant)).all()
            if not tenants:
                raise AdapterNotFound(f"no adapter has digest {digest[:12]}; publish it first")
            for tenant in tenants if measured else ():
                self._add(c, digest, tenant, measured)

    def report_evaluations(self, name: str, version: int, reported: Sequence[Evaluation]) -> AdapterVersion:
        """Record for the tenant that has the version what somebody else has measured: the gate may not believe it.

        Raises AdapterNotFound, PermissionDenied for another tenant's name, and ConflictError for too many.
        """
        with writing(self._engine) as c:
            lock(c)
            adapter_id, entry = load_entry(c, self._principal, name, to_change=True)
            digest = entry.select(str(version)).digest
            mine = (evaluations.c.digest == digest, evaluations.c.tenant == entry.tenant)
            of_clients = sa.select(sa.func.count()).where(*mine, evaluations.c.measured_by.is_not(None))
            known = c.execute(of_clients).scalar_one()
            if known + len(reported) > MAX_REPORTED:
                raise ConflictError(
                    f"{entry.name}@{version} has {known} evaluations that clients have reported, and may have "
                    f"{MAX_REPORTED:,} of them"
                )
            self._add(c, digest, entry.tenant, reported, measured_by="key")
            return load_version(c, entry.name, adapter_id, version).shown_to(self._principal)

    def _add(
        self,
        c: sa.Connection,
        digest: str,
        tenant: str,
        measured: Sequence[Evaluation],
        measured_by: str | None = None,
    ) -> None:
        common: dict[str, object] = {"digest": digest, "tenant": tenant, "measured_by": measured_by}
        common |= {"actor": self._actor, "created_at": now()}
        c.execute(evaluations.insert(), [e.model_dump() | common for e in measured])
        log(c, self._actor, "evaluate", digest, tenant=tenant, count=len(measured))

    def evaluations(self, digest: str) -> tuple[Evaluation, ...]:
        """Evaluations recorded after publication for the caller's tenant, the oldest first."""
        with reading(self._engine) as c:
            return load_evaluations(c, self._principal.tenant, digest)


_COLUMNS = [projections.c[name] for name in Projection.model_fields]


class Projections(Database):
    """The catalog's operations on VeRA's pairs.

    A replica holds a pair once for all adapters that use it. For each shape (rank, max_in, max_out), the first pair
    registered for a base is the canonical one of a tenant. An adapter with another pair is served, too, but costs one
    more pair.
    """

    def projections(self, base_fingerprint: str) -> tuple[Projection, ...]:
        """The pairs of a base's adapters in the order of first registration. The first of a shape is canonical.

        They are the caller's tenant's and the default tenant's, which others should share; an administrator gets all.
        """
        tenants = None if self._principal.is_admin else (self._principal.tenant, DEFAULT_TENANT)
        with reading(self._engine) as c:
            return _pairs_of(c, base_fingerprint, tenants)


def record_projection(c: sa.Connection, tenant: str, base_fingerprint: str, projection: Projection) -> str | None:
    """Record the pair of a tenant's adapter. Returns a warning where it is not the canonical one of its shape."""
    known = _pairs_of(c, base_fingerprint, (tenant, DEFAULT_TENANT))
    canonical = next((p for p in known if _shape(p) == _shape(projection)), projection)
    if projection.sha256 not in {p.sha256 for p in known}:
        row = projection.model_dump() | {"base_fingerprint": base_fingerprint, "tenant": tenant, "created_at": now()}
        c.execute(projections.insert().values(row))
    if canonical.sha256 == projection.sha256:
        return None
    size = (projection.max_in + projection.max_out) * projection.rank * DTYPE_BYTES["bfloat16"] / 1e6
    if canonical.key == projection.key:
        return (
            f"its VeRA pair is not the canonical one of this base, though its key is {canonical.key} too: another "
            f"PyTorch drew it, or it is another's own; replicas hold {size:.1f} MB more for it"
        )
    return (
        f"its VeRA pair has key {projection.key}, not {canonical.key} as the canonical one of this base: replicas hold "
        f"{size:.1f} MB more for it; train with projection_prng_key: {canonical.key} to share"
    )


def canonical_digests(found: tuple[Projection, ...]) -> frozenset[str]:
    """The digests of the canonical pairs among `found`, all pairs of a base in order."""
    first: dict[tuple[int, int, int], str] = {}
    for projection in found:
        first.setdefault(_shape(projection), projection.sha256)
    return frozenset(first.values())


def _pairs_of(c: sa.Connection, base_fingerprint: str, tenants: tuple[str, ...] | None) -> tuple[Projection, ...]:
    """The pairs that adapters of these tenants (None: of all) brought, each once."""
    query = sa.select(*_COLUMNS).where(projections.c.base_fingerprint == base_fingerprint).order_by(projections.c.id)
    if tenants is not None:
        query = query.where(projections.c.tenant.in_(tenants))
    found: dict[str, Projection] = {}
    for row in c.execute(query):
        found.setdefault(row.sha256, Projection(**row._asdict()))
    return tuple(found.values())


def _shape(projection: Projection) -> tuple[int, int, int]:
    return projection.rank, projection.max_in, projection.max_out


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

    def record_upload(self, digest: str) -> None:
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
    """The manifest as the caller's tenant may know it of an adapter that it gives a name of its own: without how it was
    made, where another tenant has made it and shares it.
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
            record_projection(c, new, manifest.base_fingerprint, manifest.projection)
    digests = {version.digest for version in found}

    def of(tenant: str) -> list[dict[str, object]]:
        query = sa.select(*_EVALUATION).where(evaluations.c.digest.in_(digests), evaluations.c.tenant == tenant)
        return [row._asdict() for row in c.execute(query.order_by(evaluations.c.id))]

    known = of(new)
    copied = [row | {"tenant": new} for row in of(old) if row not in known]
    if copied:
        c.execute(evaluations.insert(), copied)
