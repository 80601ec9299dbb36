"""Aliases: moves, rollbacks and deletion. The revision of an alias shows whether another caller has moved it."""

from __future__ import annotations

import sqlalchemy as sa

from loray.catalog import gate
from loray.catalog.checks import check_alias
from loray.catalog.database import Database, reading, writing
from loray.catalog.entries import AdapterVersion, AliasState
from loray.catalog.queries import (
    alias_is,
    count_change,
    load_canaries,
    load_entry,
    load_version,
    lock,
    log,
    now,
    version_id_of,
)
from loray.catalog.schema import alias_moves, aliases, versions
from loray.catalog.traffic.rows import end_running
from loray.errors import AdapterNotFound, ConflictError, GateRefused, RevisionConflict
from loray.spec import DEFAULT_ALIAS


class Aliases(Database):
    """The catalog's operations on aliases."""

    def promote(
        self,
        name: str,
        alias: str,
        version: int,
        *,
        expected: int | None = None,
        expected_revision: int | None = None,
        no_gate: str | None = None,
    ) -> AliasState:
        """Point `alias` at `version`, and end its canary. If it points there already, it does not move.

        `expected` is the version that it must point at now, `expected_revision` the revision that it must have now; 0
        means that it must not be set. `no_gate` is a reason to override the gate's refusal; it is recorded if the gate
        refuses.

        Raises ConflictError or RevisionConflict where the alias is not as expected, AdapterNotFound where there is no
        such name or version, and GateRefused where `catalog.gate` refuses the alias.
        """
        check_alias(alias)
        with writing(self._engine) as c:
            counter = lock(c)
            adapter_id, entry = load_entry(c, self._principal, name, to_change=True)
            name = entry.name
            entry.select(str(version))
            current = entry.aliases.get(alias, 0)
            if expected is not None and current != expected:
                raise ConflictError(f"{_where(name, alias, current)}, not {expected or 'unset'}: look again")
            check_revision(c, adapter_id, name, alias, expected_revision)
            where = (c, adapter_id, entry.tenant, name, alias)
            if self._move(*where, version, counter + 1, no_gate) or self._end(*where, counter + 1):
                count_change(c, adapter_id)
            return _states(c, adapter_id, name)[alias]

    def rollback(self, name: str, alias: str = DEFAULT_ALIAS, *, expected_revision: int | None = None) -> AliasState:
        """Point `alias` at its target before the last move; where it has a canary, end that instead. Each further
        rollback goes one move further back.

        Raises ConflictError where there is no earlier target, AdapterNotFound where name or alias do not exist, and
        RevisionConflict as `promote` does.
        """
        check_alias(alias)
        with writing(self._engine) as c:
            counter = lock(c)
            adapter_id, entry = load_entry(c, self._principal, name, to_change=True)
            name = entry.name
            check_revision(c, adapter_id, name, alias, expected_revision)
            current = entry.select(alias).version
            if self._end(c, adapter_id, entry.tenant, name, alias, counter + 1):
                count_change(c, adapter_id)
                return _states(c, adapter_id, name)[alias]
            stack = c.execute(
                sa.select(alias_moves.c.id, alias_moves.c.version_id, versions.c.version)
                .join(versions, versions.c.id == alias_moves.c.version_id)
                .where(_not_undone(adapter_id, alias))
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
            target = {"version_id": version_id, "revision": counter + 1}
            c.execute(aliases.update().where(alias_is(adapter_id, alias)).values(target))
            log(c, self._actor, "rollback", f"{name}@{alias}", tenant=entry.tenant, version=version, previous=current)
            count_change(c, adapter_id)
            return _states(c, adapter_id, name)[alias]

    def delete_alias(self, name: str, alias: str, *, expected_revision: int | None = None) -> None:
        """Delete `alias` and its stack of earlier targets. Versions stay.

        Raises AdapterNotFound where name or alias do not exist, and RevisionConflict as `promote` does.
        """
        check_alias(alias)
        with writing(self._engine) as c:
            counter = lock(c)
            adapter_id, entry = load_entry(c, self._principal, name, to_change=True)
            name = entry.name
            check_revision(c, adapter_id, name, alias, expected_revision)
            version = entry.select(alias).version
            self._end(c, adapter_id, entry.tenant, name, alias, counter + 1)
            c.execute(aliases.delete().where(alias_is(adapter_id, alias)))
            c.execute(alias_moves.update().where(_not_undone(adapter_id, alias)).values(undone=True))
            log(c, self._actor, "delete_alias", f"{name}@{alias}", tenant=entry.tenant, version=version)
            count_change(c, adapter_id)

    def aliases(self, name: str) -> tuple[AliasState, ...]:
        """All aliases of one name, sorted. Raises AdapterNotFound where there is no such name."""
        with reading(self._engine) as c:
            adapter_id, entry = load_entry(c, self._principal, name)
            return tuple(_states(c, adapter_id, entry.name).values())

    def alias(self, name: str, alias: str) -> AliasState:
        """Raises AdapterNotFound where there is no such name or alias."""
        states = {state.alias: state for state in self.aliases(name)}
        if alias not in states:
            raise AdapterNotFound(
                f"adapter {name!r} has no alias {alias!r}; its aliases: {', '.join(states) or 'none'}"
            )
        return states[alias]

    def _move(
        self,
        c: sa.Connection,
        adapter_id: int,
        tenant: str,
        name: str,
        alias: str,
        version: int,
        revision: int,
        no_gate: str | None,
    ) -> bool:
        """Move within a transaction that sets the change counter to `revision`; False: it points there already.

        Raises GateRefused.
        """
        version_id = version_id_of(c, adapter_id, version)
        current = c.execute(sa.select(aliases.c.version_id).where(alias_is(adapter_id, alias))).scalar()
        if current == version_id:
            return False
        against = self._check_gate(load_version(c, name, adapter_id, version), alias, no_gate)
        canary = end_running(c, adapter_id, alias, revision, "moved", target=version)
        target = {"version_id": version_id, "revision": revision}
        if current is None:
            c.execute(aliases.insert().values(adapter_id=adapter_id, alias=alias, **target))
        else:
            c.execute(aliases.update().where(alias_is(adapter_id, alias)).values(target))
        move = {"adapter_id": adapter_id, "alias": alias, "version_id": version_id, "undone": False}
        c.execute(alias_moves.insert().values(move | {"no_gate": no_gate if against else None, "created_at": now()}))
        detail = {"no_gate": no_gate, "against": against} if against else {}
        ended = {} if canary is None else {"canary": canary.version}
        log(c, self._actor, "promote", f"{name}@{alias}", tenant=tenant, version=version, **detail, **ended)
        return True

    def _end(
        self,
        c: sa.Connection,
        adapter_id: int,
        tenant: str,
        name: str,
        alias: str,
        revision: int,
    ) -> bool:
        """End the alias's canary, as `_move` moves; False: it has none."""
        canary = end_running(c, adapter_id, alias, revision, "ended")
        if canary is not None:
            log(c, self._actor, "end_canary", f"{name}@{alias}", tenant=tenant, version=canary.version)
        return canary is not None

    def _check_gate(self, version: AdapterVersion, alias: str, no_gate: str | None) -> tuple[str, ...]:
        """The gate's objections that `no_gate` overrides. Raises GateRefused where there are some and no reason."""
        against = gate.failures(
            version.manifest, version.evaluations, self._gate_tolerance, trusts_keys=self._gate_trusts_keys
        )
        if against and no_gate is None:
            raise GateRefused(
                f"alias {alias!r} is refused to {version.label}: {'; '.join(against)}. "
                f"Measure it (`loray eval perplexity {version.label} --compare --data FILE`), train it further, "
                "or give the reason why it needs no gate (--no-gate, no_gate)"
            )
        return against


def check_revision(c: sa.Connection, adapter_id: int, name: str, alias: str, expected: int | None) -> None:
    if expected is None:
        return
    state = _states(c, adapter_id, name).get(alias)
    revision, version = (state.revision, state.version) if state else (0, 0)
    if revision != expected:
        wanted = f"revision {expected}" if expected else "unset"
        raise RevisionConflict(f"{_where(name, alias, version)} with revision {revision}, not {wanted}: look again")


def _states(c: sa.Connection, adapter_id: int, name: str) -> dict[str, AliasState]:
    """States by alias, sorted."""
    rows = c.execute(
        sa.select(aliases.c.alias, versions.c.version, versions.c.digest, aliases.c.revision)
        .join(versions, versions.c.id == aliases.c.version_id)
        .where(aliases.c.adapter_id == adapter_id)
        .order_by(aliases.c.alias)
    )
    running = load_canaries(c, adapter_id).get(adapter_id, ())
    by_alias = {canary.alias: canary for canary in running}
    return {row.alias: AliasState(name, *row, by_alias.get(row.alias)) for row in rows}


def _where(name: str, alias: str, version: int) -> str:
    return f"alias {alias!r} of {name!r} " + (f"points at version {version}" if version else "is not set")


def _not_undone(adapter_id: int, alias: str) -> sa.ColumnElement[bool]:
    return sa.and_(alias_moves.c.adapter_id == adapter_id, alias_moves.c.alias == alias, ~alias_moves.c.undone)
