"""The catalog's operations on names and what belongs to them: versions, tags, evaluations, who sees a name, whose it
is; and on bases, whose names no adapter has, with VeRA's pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import sqlalchemy as sa

from loray.adapters.manifest import check_size, manifest_json, parse_manifest
from loray.catalog.aliases import AliasWrite
from loray.catalog.allowances import (
    refuse_more_bytes,
    refuse_more_memory,
    refuse_more_names,
    refuse_more_versions,
    stored_limit,
)
from loray.catalog.audit_chain import log
from loray.catalog.database import Database, upsert
from loray.catalog.entries import (
    AdapterEntry,
    AdapterVersion,
    VersionSummary,
    check_alias,
    check_name,
    check_tag,
    check_tenant,
    split_model,
    without_making,
)
from loray.catalog.queries import (
    REF,
    count_change,
    list_versions,
    load_entries,
    load_entry,
    load_version,
    name_to_register,
    new_id,
    next_revision,
    now,
    owned,
    select_names,
    visible,
)
from loray.catalog.removal import end_claim, refuse_deleted, refuse_while_trained, restore_version
from loray.catalog.schema import adapters, bases, evaluations, projections, shares, tags, uploads, versions
from loray.errors import (
    AdapterNotFound,
    ConflictError,
    GateRefused,
    LorayError,
    NotFoundError,
    PermissionDenied,
    SpecError,
)
from loray.schemas.resources import Page
from loray.spec import (
    DEFAULT_TENANT,
    DTYPE_BYTES,
    AdapterManifest,
    AdapterRef,
    Evaluation,
    Principal,
    Projection,
    Visibility,
    split_qualified,
)
from loray.telemetry import get_logger

_log = get_logger(__name__)

_MAX_VERSION = 2**31 - 1  # what the column holds


class Registration(NamedTuple):
    """A version to be registered; the fields are the arguments of `Adapters.register`."""

    name: str
    digest: str
    manifest: AdapterManifest
    aliases: tuple[str, ...] = ()
    version: int | None = None
    no_gate: str | None = None
    claim: str | None = None


@dataclass
class Adapters:
    """The catalog's operations on names and versions."""

    db: Database

    def check_name(self, name: str, aliases: Sequence[str] = ()) -> None:
        """Raise what `register` would raise of a name. Called before anything is stored."""
        for alias in aliases:
            check_alias(alias)
        with self.db.reading() as c:
            refuse_deleted(c, name_to_register(c, self.db.principal, name)[0])

    def register(
        self,
        name: str,
        digest: str,
        manifest: AdapterManifest,
        aliases: Sequence[str] = (),
        *,
        version: int | None = None,
        no_gate: str | None = None,
        claim: str | None = None,
    ) -> AdapterVersion:
        """Add a version of `name`, and move `aliases` to it. A digest that `name` has already keeps its version.

        A name that is new belongs to the caller's tenant, and is private. The caller's tenant must have uploaded the
        digest, or see it under another name, and then is not told how it was made; an administrator may register any.

        version  number of the new version, for a copy of another catalog; None: the next one
        no_gate  that of `Aliases.move`
        claim    that of `Claims.publishing`, within which the caller has put the files into the store

        Raises ConflictError where `name` is a base model's or deleted, or another digest has `version`, or the digest
        has another version; SpecError where a name or an alias is malformed; NotFoundError for a digest that does not
        exist for the caller; AdapterNotFound or PermissionDenied for another tenant's name; GateRefused as
        `Aliases.move` does; LimitExceeded, CatalogFull; ConflictError where the claim has lapsed.
        """
        asked = Registration(name, digest, manifest, tuple(aliases), version, no_gate, claim)
        self.check_name(name, aliases)
        with self.db.changing() as c:
            return self._register(c, asked)

    def register_many(self, asked: Sequence[Registration]) -> list[AdapterVersion | LorayError]:
        """Add a version of each name in one transaction, and return them in their order; of one that `register` would
        refuse its error, which does not concern the others.
        """
        found: list[AdapterVersion | LorayError] = []
        with self.db.changing() as c:
            for each in asked:
                try:
                    with c.begin_nested():
                        for alias in each.aliases:
                            check_alias(alias)
                        found.append(self._register(c, each))
                except LorayError as e:
                    found.append(e)
        return found

    def _register(self, c: sa.Connection, asked: Registration) -> AdapterVersion:
        digest, manifest, aliases, version = asked.digest, asked.manifest, asked.aliases, asked.version
        if version is not None and not 0 < version <= _MAX_VERSION:
            raise SpecError(f"version {version} is not a version number; they count from 1")
        revision = next_revision(c)
        name, tenant = name_to_register(c, self.db.principal, asked.name)
        check_digest(c, self.db.principal, digest)
        end_claim(c, asked.claim)
        refuse_deleted(c, name)
        adapter_id = c.execute(sa.select(adapters.c.id).where(adapters.c.name == name)).scalar()
        if adapter_id is None:
            refuse_more_names(c, self.db.principal, tenant)
            adapter_id = new_id(c.execute(adapters.insert().values(name=name, tenant=tenant, created_at=now())))
        mine = versions.c.adapter_id == adapter_id
        known = c.execute(sa.select(versions.c.version).where(mine, versions.c.digest == digest)).scalar()
        if known is None:
            newest = c.execute(sa.select(sa.func.max(versions.c.version)).where(mine)).scalar() or 0
            number = version or newest + 1
            taken = c.execute(sa.select(versions.c.digest).where(mine, versions.c.version == number)).scalar()
            if taken is not None:
                raise ConflictError(f"{name}@{number} exists already, with other content (digest {taken[:12]})")
            refuse_more_versions(c, self.db.principal, tenant, adapter_id, digest, manifest)
            refuse_more_memory(c, self.db.max_snapshot_bytes)
            manifest = known_manifest(c, self.db.principal, digest, manifest)
            kept = manifest_json(manifest)
            check_size(manifest, kept)
            ref = manifest.ref(digest, name, number)
            row = {column: getattr(ref, column) for column in REF}
            row |= {"adapter_id": adapter_id, "manifest": kept.decode(), "created_at": now()}
            c.execute(versions.insert().values(row))
            log(c, self.db.actor, "register", f"{name}@{number}", tenant=tenant, digest=digest)
            if manifest.projection is not None:
                remark = record_projection(c, tenant, manifest.base_fingerprint, manifest.projection)
                if remark is not None:
                    _log.warning("%s@%d: %s", name, number, remark)
        elif version not in (None, known):
            raise ConflictError(f"{name!r} has this adapter as version {known} already, so it cannot be {version}")
        else:
            number = known
        moved = restore_version(c, adapter_id, number)
        for alias in aliases:
            try:
                write = AliasWrite(self.db, c, adapter_id, tenant, name, alias, revision)
                moved |= write.move(number, asked.no_gate)
            except GateRefused as e:
                raise GateRefused(f"{e}; nothing was registered: do that without an alias first") from None
        if known is None or moved:
            count_change(c, adapter_id)
        return load_version(c, name, adapter_id, number)

    def resolve(self, model: str) -> AdapterRef:
        """`name`, `name@3` or `name@alias` → the version. Raises AdapterNotFound, which suggests similar names."""
        name, selector = split_model(model)
        with self.db.reading() as c:
            return load_entry(c, self.db.principal, name)[1].select(selector)

    def page(
        self,
        *,
        limit: int,
        after: str = "",
        tenant: str | None = None,
        base: str | None = None,
        method: str | None = None,
        search: str | None = None,
        tags: Mapping[str, str | None] | None = None,
    ) -> tuple[AdapterEntry, ...]:
        """At most `limit` names after `after`, in order.

        base, method  of the version that the bare name means; `base` is a base model's name
        search        part of the name, whatever its case
        tags          key → value; None: any value
        """
        with self.db.reading() as c:
            query = select_names(
                c, self.db.principal, after, tenant=tenant, base=base, method=method, search=search, tags=tags or {}
            )
            names: list[str] = list(c.scalars(query.limit(limit)))
            found = {entry.name: entry for _, entry in load_entries(c, self.db.principal, adapters.c.name.in_(names))}
            return tuple(found[name] for name in names)  # the database's order depends on its collation

    def get(self, name: str) -> AdapterEntry:
        """One name with its versions and aliases. Raises AdapterNotFound."""
        with self.db.reading() as c:
            return load_entry(c, self.db.principal, name)[1]

    def versions(self, name: str, *, limit: int, before: int | None = None) -> Page[VersionSummary]:
        """At most `limit` versions older than `before` (None: from the newest on), fewer where they have thousands of
        evaluations. Raises AdapterNotFound.
        """
        with self.db.reading() as c:
            adapter_id, entry = load_entry(c, self.db.principal, name)
            page = list_versions(c, adapter_id, entry, limit, before)
            shown = tuple(v.shown_to(self.db.principal) for v in page.items)
            return page.model_copy(update={"items": shown})

    def version(self, name: str, version: int) -> AdapterVersion:
        """One version, with its manifest. Raises AdapterNotFound."""
        with self.db.reading() as c:
            adapter_id, entry = load_entry(c, self.db.principal, name)
            found = load_version(c, entry.name, adapter_id, entry.select(str(version)).version)
            return found.shown_to(self.db.principal)

    def share(self, name: str, visibility: Visibility, shared_with: Collection[str] = ()) -> AdapterEntry:
        """Set who sees `name` beside its tenant: nobody, the tenants of `shared_with`, or everybody.

        Others see and ask it; only its tenant changes it. Raises AdapterNotFound, PermissionDenied where it is another
        tenant's, and SpecError where `shared_with` is malformed, or does not belong to the visibility.
        """
        if (visibility == "shared") != bool(shared_with):
            raise SpecError("`shared_with` names the tenants of the visibility `shared`, and of no other")
        for tenant in shared_with:
            check_tenant(tenant)
        with self.db.changing() as c:
            adapter_id, entry = load_entry(c, self.db.principal, name, to_change=True)
            wanted = frozenset(shared_with) - {entry.tenant}
            if (visibility, wanted) != (entry.visibility, entry.shared_with):
                c.execute(adapters.update().where(adapters.c.id == adapter_id).values(visibility=visibility))
                c.execute(shares.delete().where(shares.c.adapter_id == adapter_id))
                if wanted:
                    c.execute(shares.insert(), [{"adapter_id": adapter_id, "tenant": tenant} for tenant in wanted])
                detail = {"visibility": visibility, "shared_with": sorted(wanted)}
                log(c, self.db.actor, "share", entry.name, tenant=entry.tenant, **detail)
                count_change(c, adapter_id)
            # qualified, since the own tenant may have an adapter of the bare name
            return load_entry(c, self.db.principal, f"{entry.tenant}/{split_qualified(entry.name).name}")[1]

    def record_upload(self, digest: str) -> None:
        """The caller's tenant has brought the bytes of this digest, which it may register from now on."""
        key = {"digest": digest, "tenant": self.db.principal.tenant}
        where = [uploads.c[column] == value for column, value in key.items()]
        with self.db.reading() as c:
            if c.execute(sa.select(uploads.c.digest).where(*where)).first() is not None:
                return
        with self.db.changing() as c:
            if c.execute(sa.select(uploads.c.digest).where(*where)).first() is None:
                c.execute(uploads.insert().values(key | {"created_at": now()}))

    def check_digest(self, digest: str) -> None:
        """Raise NotFoundError where `register` would not accept the digest from this caller."""
        with self.db.reading() as c:
            check_digest(c, self.db.principal, digest)

    def check_stored_bytes(self, more: Callable[[], int]) -> None:
        """Raise LimitExceeded where so many bytes beside the adapters of the caller's tenant are more than it may
        store. They are counted only if there is a limit.
        """
        principal = self.db.principal
        with self.db.reading() as c:
            if stored_limit(c, principal, principal.tenant) is None:
                return
        num_bytes = more()
        with self.db.reading() as c:
            refuse_more_bytes(c, principal, principal.tenant, num_bytes)

    def transfer(self, name: str, tenant: str, new_name: str | None = None) -> AdapterEntry:
        """Make `name` another tenant's, as `new_name` or under the bare name that it has.

        Versions keep numbers and digests; aliases, tags and visibility stay, and so do evaluations. The old name is
        free afterwards. Only an administrator may do it, since it changes what both tenants have.

        Raises AdapterNotFound, PermissionDenied, SpecError where the tenant is unknown or has the name already, and
        ConflictError where the new name is taken or deleted, or a job trains for the old one.
        """
        if not self.db.principal.is_admin:
            raise PermissionDenied("only an administrator hands an adapter to another tenant")
        with self.db.changing() as c:
            adapter_id, entry = load_entry(c, self.db.principal, name, to_change=True)
            if tenant == entry.tenant:
                raise SpecError(f"adapter {entry.name!r} belongs to tenant {tenant} already")
            bare = split_qualified(entry.name).name if new_name is None else new_name
            stored, _ = name_to_register(c, self.db.principal, f"{tenant}/{bare}")
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
            log(c, self.db.actor, "transfer", entry.name, tenant=entry.tenant, to=stored)
            log(c, self.db.actor, "transfer", stored, tenant=tenant, of=entry.name)
            count_change(c, adapter_id)
            return load_entry(c, self.db.principal, f"{tenant}/{split_qualified(stored).name}")[1]


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


# -- bases ------------------------------------------------------------------------------------------------------------

_COLUMNS = [projections.c[name] for name in Projection.model_fields]


@dataclass
class Bases:
    """The catalog's operations on bases and VeRA's pairs.

    A replica holds a pair once for all adapters that use it. For each shape (rank, max_in, max_out), the first pair
    registered for a base is the canonical one of a tenant. An adapter with another pair is served, too, but costs one
    more pair.
    """

    db: Database

    def add(self, name: str, fingerprint: str, of: str | None = None) -> None:
        """Reserve `name` for a base model. Repeating it with the same fingerprint changes nothing.

        `of` is the fingerprint of the 16-bit base whose quantised form it is: adapters of that are served on this, too.
        An administrator may add it later.

        Raises ConflictError where an adapter of the default tenant has the name, or the base has another fingerprint or
        is a form of another base.
        Only an administrator reserves names: PermissionDenied where the catalog has no base with this fingerprint.
        """
        check_name(name, "base name")
        with self.db.changing() as c:
            known = c.execute(sa.select(bases).where(bases.c.name == name)).first()
            if known is not None:
                if known.fingerprint != fingerprint:
                    raise ConflictError(
                        f"the catalog knows base model {name!r} with fingerprint {known.fingerprint[:12]}, not "
                        f"{fingerprint[:12]}; add these weights under another name"
                    )
                if of is not None and known.of is not None and of != known.of:
                    raise ConflictError(
                        f"the catalog knows base model {name!r} as a form of {known.of[:12]}, not of {of[:12]}; add it "
                        "under another name"
                    )
                if of is not None and known.of is None and self.db.principal.is_admin:
                    c.execute(bases.update().where(bases.c.name == name).values(of=of))
                    log(c, self.db.actor, "add_base", name, fingerprint=fingerprint, of=of)
                    count_change(c)
                return
            if not self.db.principal.is_admin:
                if c.execute(sa.select(bases.c.name).where(bases.c.fingerprint == fingerprint)).first() is None:
                    raise PermissionDenied(
                        f"no base model {name!r} of fingerprint {fingerprint[:12]}: an administrator adds it first"
                    )
                return
            if c.execute(sa.select(adapters.c.id).where(adapters.c.name == name)).first():
                raise ConflictError(f"{name!r} is an adapter's name already; a base model needs another")
            c.execute(bases.insert().values(name=name, fingerprint=fingerprint, of=of, created_at=now()))
            log(c, self.db.actor, "add_base", name, fingerprint=fingerprint, **({} if of is None else {"of": of}))
            count_change(c)

    def fingerprints(self) -> dict[str, str]:
        """Name → fingerprint of the base models, sorted by name."""
        with self.db.reading() as c:
            return {row.name: row.fingerprint for row in c.execute(sa.select(bases).order_by(bases.c.name))}

    def forms(self) -> dict[str, str]:
        """Fingerprint of a quantised base → that of the 16-bit base whose form it is."""
        with self.db.reading() as c:
            return {row.fingerprint: row.of for row in c.execute(sa.select(bases).where(bases.c.of.is_not(None)))}

    def projections(self, base_fingerprint: str) -> tuple[Projection, ...]:
        """The pairs of a base's adapters in the order of first registration. The first of a shape is canonical.

        They are the caller's tenant's and the default tenant's, which others should share; an administrator gets all.
        """
        tenants = None if self.db.principal.is_admin else (self.db.principal.tenant, DEFAULT_TENANT)
        with self.db.reading() as c:
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


# -- tags and evaluations --------------------------------------------------------------------------------------------

MAX_TAGS = 100  # of a name


@dataclass
class Tags:
    """The catalog's operations on tags. They do not count as changes, since serving does not depend on them.

    Who sees a name sees its tags, and who may change it sets them. All raise AdapterNotFound.
    """

    db: Database

    def of(self, name: str) -> Mapping[str, str]:
        """The tags of a name, sorted by key."""
        with self.db.reading() as c:
            return _tags_of(c, load_entry(c, self.db.principal, name)[0])

    def set(self, name: str, key: str, value: str) -> bool:
        """Set a tag, or give it another value. Returns whether the name did not have it.

        Raises PermissionDenied for another tenant's name, SpecError for a malformed tag, ConflictError for too many.
        """
        check_tag(key, value)
        with self.db.changing() as c:
            adapter_id, entry = load_entry(c, self.db.principal, name, to_change=True)
            known = _tags_of(c, adapter_id)
            if key not in known and len(known) >= MAX_TAGS:
                raise ConflictError(f"{entry.name!r} has {MAX_TAGS} tags already: delete one of them first")
            if known.get(key) != value:
                upsert(c, tags, [{"adapter_id": adapter_id, "key": key, "value": value}])
                log(c, self.db.actor, "set_tag", entry.name, tenant=entry.tenant, key=key, value=value)
            return key not in known

    def delete(self, name: str, key: str) -> None:
        """Delete a tag. Raises PermissionDenied for another tenant's name, NotFoundError where it has no such tag."""
        with self.db.changing() as c:
            adapter_id, entry = load_entry(c, self.db.principal, name, to_change=True)
            if c.execute(tags.delete().where(tags.c.adapter_id == adapter_id, tags.c.key == key)).rowcount == 0:
                known = ", ".join(_tags_of(c, adapter_id)) or "none"
                raise NotFoundError(f"adapter {entry.name!r} has no tag {key!r}; its tags: {known}")
            log(c, self.db.actor, "delete_tag", entry.name, tenant=entry.tenant, key=key)


def _tags_of(c: sa.Connection, adapter_id: int) -> dict[str, str]:
    rows = c.execute(sa.select(tags.c.key, tags.c.value).where(tags.c.adapter_id == adapter_id))
    return dict(sorted((row.key, row.value) for row in rows))


MAX_REPORTED = 1024  # evaluations of an adapter


@dataclass
class Evaluations:
    """The catalog's operations on evaluations. They do not count as changes, since serving does not depend on them."""

    db: Database

    def record(self, digest: str, measured: Sequence[Evaluation]) -> None:
        """Record evaluations of the adapter, for each tenant that has it and whose adapters the caller may change.

        Raises AdapterNotFound where there is none.
        """
        with self.db.changing() as c:
            query = sa.select(adapters.c.tenant).join(versions, versions.c.adapter_id == adapters.c.id)
            query = query.where(versions.c.digest == digest, owned(self.db.principal))
            tenants = c.scalars(query.distinct().order_by(adapters.c.tenant)).all()
            if not tenants:
                raise AdapterNotFound(f"no adapter has digest {digest[:12]}; publish it first")
            for tenant in tenants if measured else ():
                self._add(c, digest, tenant, measured)

    def report(self, name: str, version: int, reported: Sequence[Evaluation]) -> AdapterVersion:
        """Record for the tenant that has the version what somebody else has measured: the gate may not believe it.

        Raises AdapterNotFound, PermissionDenied for another tenant's name, and ConflictError for too many.
        """
        with self.db.changing() as c:
            adapter_id, entry = load_entry(c, self.db.principal, name, to_change=True)
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
            return load_version(c, entry.name, adapter_id, version).shown_to(self.db.principal)

    def _add(
        self,
        c: sa.Connection,
        digest: str,
        tenant: str,
        measured: Sequence[Evaluation],
        measured_by: str | None = None,
    ) -> None:
        common: dict[str, object] = {"digest": digest, "tenant": tenant, "measured_by": measured_by}
        common |= {"actor": self.db.actor, "created_at": now()}
        c.execute(evaluations.insert(), [e.model_dump() | common for e in measured])
        log(c, self.db.actor, "evaluate", digest, tenant=tenant, count=len(measured))
