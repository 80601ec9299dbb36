"""The catalog: registers versions and resolves names. Every write is one transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import sqlalchemy as sa

from loray.adapters.manifest import check_size, manifest_json
from loray.catalog.adapters import (
    Evaluations,
    Projections,
    Sharing,
    Tags,
    Transfer,
    check_digest,
    known_manifest,
    record_projection,
)
from loray.catalog.aliases import Canaries
from loray.catalog.allowances import Allowances, refuse_more_memory, refuse_more_names, refuse_more_versions
from loray.catalog.audit_chain import log
from loray.catalog.backup import Backups
from loray.catalog.database import reading, writing
from loray.catalog.entries import (
    AdapterDetail,
    AdapterEntry,
    AdapterVersion,
    AliasMove,
    VersionPage,
    check_alias,
    check_name,
    split_model,
)
from loray.catalog.identity import Audit, Keys, Logins, Tenants
from loray.catalog.jobs import Jobs
from loray.catalog.quarantine import Quarantines
from loray.catalog.queries import (
    count_change,
    list_versions,
    load_entries,
    load_entry,
    load_version,
    lock,
    name_to_register,
    new_id,
    now,
    select_names,
    utc,
)
from loray.catalog.quotas import Quotas
from loray.catalog.removal import Claims, Deletion, StoreReferences, end_claim, refuse_deleted, restore_version
from loray.catalog.schema import adapters, alias_moves, bases, versions
from loray.catalog.snapshot import CatalogSnapshot, changes_since, read_counter
from loray.catalog.usage import UsageTable
from loray.errors import ConflictError, GateRefused, PermissionDenied, SpecError
from loray.spec import AdapterManifest, AdapterRef
from loray.telemetry import get_logger

_log = get_logger(__name__)

_MAX_VERSION = 2**31 - 1  # what the column holds


class Catalog(
    Allowances,
    Audit,
    Backups,
    Canaries,
    Claims,
    Deletion,
    Evaluations,
    Jobs,
    Keys,
    Logins,
    Projections,
    Quarantines,
    Quotas,
    Sharing,
    StoreReferences,
    Tags,
    Tenants,
    Transfer,
    UsageTable,
):
    """The catalog at a SQLAlchemy URL (sqlite or postgresql), whose tables are made when it is first opened.
    Thread-safe.

    The audit log records `actor` with every write. `gate_tolerance` and `gate_trusts_keys` are those of
    `aliases.failures`.
    """

    # -- writing ------------------------------------------------------------------------------------------------------

    def add_base(self, name: str, fingerprint: str) -> None:
        """Reserve `name` for a base model. Repeating it with the same fingerprint changes nothing.

        Raises ConflictError where an adapter of the default tenant has the name, or the base has another fingerprint.
        Only an administrator reserves names: PermissionDenied where the catalog has no base with this fingerprint.
        """
        check_name(name, "base name")
        with writing(self._engine) as c:
            lock(c)
            known = c.execute(sa.select(bases.c.fingerprint).where(bases.c.name == name)).scalar()
            if known is not None:
                if known != fingerprint:
                    raise ConflictError(
                        f"the catalog knows base model {name!r} with fingerprint {known[:12]}, not {fingerprint[:12]}; "
                        "add these weights under another name"
                    )
                return
            if not self._principal.is_admin:
                if c.execute(sa.select(bases.c.name).where(bases.c.fingerprint == fingerprint)).first() is None:
                    raise PermissionDenied(
                        f"no base model {name!r} of fingerprint {fingerprint[:12]}: an administrator adds it first"
                    )
                return
            if c.execute(sa.select(adapters.c.id).where(adapters.c.name == name)).first():
                raise ConflictError(f"{name!r} is an adapter's name already; a base model needs another")
            c.execute(bases.insert().values(name=name, fingerprint=fingerprint, created_at=now()))
            log(c, self._actor, "add_base", name, fingerprint=fingerprint)
            count_change(c)

    def check_name(self, name: str, aliases: Sequence[str] = ()) -> None:
        """Raise what `register` would raise of a name. Called before anything is stored."""
        for alias in aliases:
            check_alias(alias)
        with reading(self._engine) as c:
            refuse_deleted(c, name_to_register(c, self._principal, name)[0])

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

        `version` is the number of the new version, for a copy of another catalog; None: the next one. `no_gate` is that
        of `promote`. `claim` is that of `publishing`, within which the caller has put the files into the store.

        Raises ConflictError where `name` is a base model's or deleted, or another digest has `version`, or the digest
        has another version; SpecError where a name or an alias is malformed; NotFoundError for a digest that does not
        exist for the caller; AdapterNotFound or PermissionDenied for another tenant's name; GateRefused as `promote`
        does; LimitExceeded, CatalogFull; ConflictError where the claim has lapsed.
        """
        self.check_name(name, aliases)
        if version is not None and not 0 < version <= _MAX_VERSION:
            raise SpecError(f"version {version} is not a version number; they count from 1")
        with writing(self._engine) as c:
            counter = lock(c)
            name, tenant = name_to_register(c, self._principal, name)
            check_digest(c, self._principal, digest)
            end_claim(c, claim)
            refuse_deleted(c, name)
            adapter_id = c.execute(sa.select(adapters.c.id).where(adapters.c.name == name)).scalar()
            if adapter_id is None:
                refuse_more_names(c, self._principal, tenant)
                adapter_id = new_id(c.execute(adapters.insert().values(name=name, tenant=tenant, created_at=now())))
            mine = versions.c.adapter_id == adapter_id
            known = c.execute(sa.select(versions.c.version).where(mine, versions.c.digest == digest)).scalar()
            if known is None:
                newest = c.execute(sa.select(sa.func.max(versions.c.version)).where(mine)).scalar() or 0
                number = version or newest + 1
                _refuse_taken(c, name, adapter_id, number)
                refuse_more_versions(c, self._principal, tenant, adapter_id, digest, manifest)
                refuse_more_memory(c, self._max_snapshot_bytes)
                manifest = known_manifest(c, self._principal, digest, manifest)
                kept = manifest_json(manifest)
                check_size(manifest, kept)
                row = {
                    "adapter_id": adapter_id,
                    "version": number,
                    "digest": digest,
                    "method": manifest.method,
                    "base_fingerprint": manifest.base_fingerprint,
                    "context_length": manifest.context_length,
                    "nbytes": manifest.nbytes,
                    "manifest": kept.decode(),
                    "tool_parser": manifest.tool_parser,
                    "chat_template": manifest.ref(digest, name, number).chat_template,
                    "created_at": now(),
                }
                c.execute(versions.insert().values(row))
                log(c, self._actor, "register", f"{name}@{number}", tenant=tenant, digest=digest)
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
                    moved |= self._move(c, adapter_id, tenant, name, alias, number, counter + 1, no_gate)
                except GateRefused as e:
                    raise GateRefused(f"{e}; nothing was registered: do that without an alias first") from None
            if known is None or moved:
                count_change(c, adapter_id)
            return load_version(c, name, adapter_id, number)

    # -- reading ------------------------------------------------------------------------------------------------------

    def resolve(self, model: str) -> AdapterRef:
        """`name`, `name@3` or `name@alias` → the version. Raises AdapterNotFound, which suggests similar names."""
        name, selector = split_model(model)
        with reading(self._engine) as c:
            return load_entry(c, self._principal, name)[1].select(selector)

    def adapters(self) -> tuple[AdapterEntry, ...]:
        """All names of the caller, sorted."""
        return tuple(self.snapshot().models())

    def names(
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
        with reading(self._engine) as c:
            query = select_names(
                c, self._principal, after, tenant=tenant, base=base, method=method, search=search, tags=tags or {}
            )
            names: list[str] = list(c.scalars(query.limit(limit)))
            found = {entry.name: entry for _, entry in load_entries(c, self._principal, adapters.c.name.in_(names))}
            return tuple(found[name] for name in names)  # the database's order depends on its collation

    def entry(self, name: str) -> AdapterEntry:
        """One name with its versions and aliases. Raises AdapterNotFound."""
        with reading(self._engine) as c:
            return load_entry(c, self._principal, name)[1]

    def versions(self, name: str, *, limit: int, before: int | None = None) -> VersionPage:
        """At most `limit` versions older than `before` (None: from the newest on), fewer where they have thousands of
        evaluations. Raises AdapterNotFound.
        """
        with reading(self._engine) as c:
            adapter_id, entry = load_entry(c, self._principal, name)
            page = list_versions(c, adapter_id, entry, limit, before)
            return page._replace(versions=tuple(v.shown_to(self._principal) for v in page.versions))

    def version(self, name: str, version: int) -> AdapterVersion:
        """One version, with its manifest. Raises AdapterNotFound."""
        with reading(self._engine) as c:
            adapter_id, entry = load_entry(c, self._principal, name)
            found = load_version(c, entry.name, adapter_id, entry.select(str(version)).version)
            return found.shown_to(self._principal)

    def bases(self) -> dict[str, str]:
        """Name → fingerprint of the base models, sorted by name."""
        with reading(self._engine) as c:
            return {row.name: row.fingerprint for row in c.execute(sa.select(bases).order_by(bases.c.name))}

    def adapter(self, name: str) -> AdapterDetail:
        """All data of one name, manifests and alias history included. Raises AdapterNotFound."""
        with reading(self._engine) as c:
            adapter_id, entry = load_entry(c, self._principal, name)
            moves = c.execute(
                sa.select(alias_moves, versions.c.version)
                .join(versions, versions.c.id == alias_moves.c.version_id)
                .where(alias_moves.c.adapter_id == adapter_id)
                .order_by(alias_moves.c.id)
            ).all()
            numbers = sorted(entry.versions, reverse=True)
            return AdapterDetail(
                entry=entry,
                versions=tuple(load_version(c, entry.name, adapter_id, v).shown_to(self._principal) for v in numbers),
                moves=tuple(AliasMove(m.alias, m.version, m.undone, utc(m.created_at), m.no_gate) for m in moves),
                canaries=self._known(c, adapter_id, entry),
            )

    def change_counter(self) -> int:
        """The change counter, which grows with every write to names: a snapshot with the same one is up to date."""
        with reading(self._engine) as c:
            return read_counter(c)

    def snapshot(self, before: CatalogSnapshot | None = None, *, whole: bool = False) -> CatalogSnapshot:
        """All names of the caller now. Only what changed since the snapshot `before` is read; the rest is shared.

        `before` must be the caller's. `whole`: all is read, for it may be of another copy of this catalog: the database
        may have been restored.
        """
        before = before or CatalogSnapshot()
        with reading(self._engine) as c:
            whole = whole or read_counter(c) < before.counter
            return before.after(changes_since(c, self._principal, before, whole=whole))


def _refuse_taken(c: sa.Connection, name: str, adapter_id: int, version: int) -> None:
    query = sa.select(versions.c.digest).where(versions.c.adapter_id == adapter_id, versions.c.version == version)
    digest = c.execute(query).scalar()
    if digest is not None:
        raise ConflictError(f"{name}@{version} exists already, with other content (digest {digest[:12]})")
