"""Names of adapters: register, resolve, promote, roll back. Every write is one transaction."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from pydantic import TypeAdapter, ValidationError

from loray.adapters.manifest import canonical_json
from loray.catalog.database import open_database, reading, writing
from loray.catalog.entries import (
    DEFAULT_ALIAS,
    AdapterDetail,
    AdapterEntry,
    AdapterVersion,
    AliasMove,
    CatalogSnapshot,
    split_model,
)
from loray.catalog.queries import (
    alias_is,
    count_change,
    load_entries,
    load_entry,
    load_version,
    lock,
    new_id,
    now,
    refuse_base_name,
    utc,
    version_id_of,
)
from loray.catalog.schema import adapters, alias_moves, aliases, audit_log, bases, changes, versions
from loray.errors import ConflictError, SpecError
from loray.spec import AdapterManifest, AdapterRef, Alias, Name


class Catalog:
    """The catalog at a SQLAlchemy URL (sqlite or postgresql), migrated when it is opened. Thread-safe.

    `actor` is who the audit log says did it.
    """

    def __init__(self, url: str, *, actor: str = "local") -> None:
        self._engine = open_database(url)
        self._actor = actor

    def close(self) -> None:
        self._engine.dispose()

    # -- writing ------------------------------------------------------------------------------------------------------

    def add_base(self, name: str, fingerprint: str) -> None:
        """Reserve `name` for a base model; again with the same fingerprint changes nothing.

        ConflictError where an adapter has the name, or the base another fingerprint.
        """
        _check(Name, name, "base name")
        with writing(self._engine) as c:
            lock(c)
            if c.execute(sa.select(adapters.c.id).where(adapters.c.name == name)).first():
                raise ConflictError(f"{name!r} is an adapter's name already; a base model needs another")
            known = c.execute(sa.select(bases.c.fingerprint).where(bases.c.name == name)).scalar()
            if known is not None:
                if known != fingerprint:
                    raise ConflictError(
                        f"the catalog knows base model {name!r} with fingerprint {known[:12]}, not {fingerprint[:12]}; "
                        "add these weights under another name"
                    )
                return
            c.execute(bases.insert().values(name=name, fingerprint=fingerprint, created_at=now()))
            self._log(c, "add_base", name, fingerprint=fingerprint)
            count_change(c)

    def check_name(self, name: str, aliases: Sequence[str] = ()) -> None:
        """What `register` would refuse of names, before anything is stored: SpecError or ConflictError."""
        _check(Name, name, "adapter name")
        for alias in aliases:
            _check(Alias, alias, "alias")
        with reading(self._engine) as c:
            refuse_base_name(c, name)

    def register(
        self, name: str, digest: str, manifest: AdapterManifest, aliases: Sequence[str] = ()
    ) -> AdapterVersion:
        """A new version of `name`, and `aliases` moved to it. A digest that `name` has already keeps its version.

        ConflictError where `name` is a base model's, SpecError where a name or an alias is malformed.
        """
        self.check_name(name, aliases)
        with writing(self._engine) as c:
            lock(c)
            refuse_base_name(c, name)
            adapter_id = c.execute(sa.select(adapters.c.id).where(adapters.c.name == name)).scalar()
            if adapter_id is None:
                inserted = c.execute(adapters.insert().values(name=name, created_at=now()))
                adapter_id = new_id(inserted)
            mine = versions.c.adapter_id == adapter_id
            row = c.execute(
                sa.select(versions.c.id, versions.c.version).where(mine, versions.c.digest == digest)
            ).first()
            if row is None:
                newest = c.execute(sa.select(sa.func.max(versions.c.version)).where(mine)).scalar()
                version = (newest or 0) + 1
                inserted = c.execute(
                    versions.insert().values(
                        adapter_id=adapter_id,
                        version=version,
                        digest=digest,
                        method=manifest.method,
                        base_fingerprint=manifest.base_fingerprint,
                        context_length=manifest.context_length,
                        nbytes=manifest.nbytes,
                        manifest=canonical_json(manifest).decode(),
                        created_at=now(),
                    )
                )
                version_id = new_id(inserted)
                self._log(c, "register", f"{name}@{version}", digest=digest)
            else:
                version_id, version = row
            for alias in aliases:
                self._move(c, adapter_id, name, alias, version_id, version)
            count_change(c)
            return load_version(c, name, adapter_id, version)

    def promote(self, name: str, alias: str, version: int, *, expected: int | None = None) -> AdapterVersion:
        """Point `alias` at `version`. With `expected`, only if it points there now (0: only if it is not set).

        ConflictError where it has moved meanwhile, AdapterNotFound where there is no such name or version.
        """
        _check(Alias, alias, "alias")
        with writing(self._engine) as c:
            lock(c)
            adapter_id, entry = load_entry(c, name)
            entry.select(str(version))
            current = entry.aliases.get(alias, 0)
            if expected is not None and current != expected:
                was = f"points at version {current}" if current else "is not set"
                raise ConflictError(f"alias {alias!r} of {name!r} {was}, not {expected or 'unset'}: look again")
            version_id = version_id_of(c, adapter_id, version)
            self._move(c, adapter_id, name, alias, version_id, version)
            count_change(c)
            return load_version(c, name, adapter_id, version)

    def rollback(self, name: str, alias: str = DEFAULT_ALIAS) -> AdapterVersion:
        """Point `alias` back at where it pointed before its last move; again goes one further back.

        ConflictError where there is nothing to go back to, AdapterNotFound where name or alias do not exist.
        """
        _check(Alias, alias, "alias")
        with writing(self._engine) as c:
            lock(c)
            adapter_id, entry = load_entry(c, name)
            current = entry.select(alias).version
            stack = c.execute(
                sa.select(alias_moves.c.id, alias_moves.c.version_id, versions.c.version)
                .join(versions, versions.c.id == alias_moves.c.version_id)
                .where(alias_moves.c.adapter_id == adapter_id, alias_moves.c.alias == alias, ~alias_moves.c.undone)
                .order_by(alias_moves.c.id.desc())
                .limit(2)
            ).all()
            if len(stack) < 2:
                raise ConflictError(
                    f"alias {alias!r} of {name!r} has no earlier target than version {current}; "
                    "promote another version instead"
                )
            (move_id, _, _), (_, version_id, version) = stack
            c.execute(alias_moves.update().where(alias_moves.c.id == move_id).values(undone=True))
            c.execute(aliases.update().where(alias_is(adapter_id, alias)).values(version_id=version_id))
            self._log(c, "rollback", f"{name}@{alias}", version=version, previous=current)
            count_change(c)
            return load_version(c, name, adapter_id, version)

    # -- reading ------------------------------------------------------------------------------------------------------

    def resolve(self, model: str) -> AdapterRef:
        """`name` (alias `prod` where set, else the newest), `name@3` or `name@alias`; AdapterNotFound suggests."""
        name, selector = split_model(model)
        with reading(self._engine) as c:
            return load_entry(c, name)[1].select(selector)

    def adapters(self) -> tuple[AdapterEntry, ...]:
        """All names, sorted."""
        return self.snapshot().models()

    def adapter(self, name: str) -> AdapterDetail:
        """Everything known of one name, manifests and alias history too."""
        with reading(self._engine) as c:
            adapter_id, entry = load_entry(c, name)
            moves = c.execute(
                sa.select(alias_moves, versions.c.version)
                .join(versions, versions.c.id == alias_moves.c.version_id)
                .where(alias_moves.c.adapter_id == adapter_id)
                .order_by(alias_moves.c.id)
            ).all()
            return AdapterDetail(
                entry=entry,
                versions=tuple(load_version(c, name, adapter_id, v) for v in sorted(entry.versions, reverse=True)),
                moves=tuple(AliasMove(m.alias, m.version, m.undone, utc(m.created_at)) for m in moves),
            )

    def change_counter(self) -> int:
        """Grows with every write: a snapshot with the same counter is up to date."""
        with reading(self._engine) as c:
            return int(c.execute(sa.select(changes.c.counter)).scalar_one())

    def snapshot(self) -> CatalogSnapshot:
        with reading(self._engine) as c:
            return CatalogSnapshot(
                counter=c.execute(sa.select(changes.c.counter)).scalar_one(),
                bases={row.name: row.fingerprint for row in c.execute(sa.select(bases))},
                adapters={entry.name: entry for _, entry in load_entries(c)},
            )

    # -- inside a transaction -----------------------------------------------------------------------------------------

    def _move(self, c: sa.Connection, adapter_id: int, name: str, alias: str, version_id: int, version: int) -> None:
        current = c.execute(sa.select(aliases.c.version_id).where(alias_is(adapter_id, alias))).scalar()
        if current == version_id:
            return
        if current is None:
            c.execute(aliases.insert().values(adapter_id=adapter_id, alias=alias, version_id=version_id))
        else:
            c.execute(aliases.update().where(alias_is(adapter_id, alias)).values(version_id=version_id))
        c.execute(
            alias_moves.insert().values(
                adapter_id=adapter_id, alias=alias, version_id=version_id, undone=False, created_at=now()
            )
        )
        self._log(c, "promote", f"{name}@{alias}", version=version)

    def _log(self, c: sa.Connection, action: str, subject: str, **detail: Any) -> None:
        c.execute(
            audit_log.insert().values(
                actor=self._actor, action=action, subject=subject, detail=json.dumps(detail), created_at=now()
            )
        )


def _check(kind: Any, value: str, what: str) -> None:
    try:
        TypeAdapter(kind).validate_python(value)
    except ValidationError as e:
        rule = (
            "letters, digits, '.', '_' and '-', at most 96"
            if kind is Name
            else "a letter, then letters, digits, '_', '-'"
        )
        raise SpecError(f"{value!r} is not a valid {what}: {rule}") from e
