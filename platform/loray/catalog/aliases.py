"""The catalog's operations on aliases and their canaries, and the gate that some adapters must pass before an alias."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa

from loray.catalog.audit_chain import log
from loray.catalog.database import Database
from loray.catalog.entries import AdapterEntry, AdapterVersion, check_alias, weights_of
from loray.catalog.queries import (
    alias_is,
    count_change,
    load_canaries,
    load_entry,
    load_version,
    next_revision,
    now,
    utc,
    version_id_of,
)
from loray.catalog.schema import adapters, alias_moves, aliases, canaries, versions
from loray.errors import AdapterNotFound, ConflictError, GateRefused, NotFoundError, RevisionConflict, SpecError
from loray.policy.canary import Bound, breach
from loray.schemas.resources import AliasResource
from loray.spec import (
    DEFAULT_ALIAS,
    PERPLEXITY,
    AdapterManifest,
    CanaryBounds,
    CanaryCounts,
    CanaryOutcome,
    CanaryState,
    Evaluation,
    Principal,
    Subject,
)

# -- the gate ---------------------------------------------------------------------------------------------------------

_NAMES: Mapping[Subject, str] = {"base": "the base", "base_scaled": "the base under its RoPE", "adapter": "the adapter"}


def is_gated(manifest: AdapterManifest) -> bool:
    """An adapter that extends no context has nothing to show here, whatever attention it was trained with."""
    return manifest.rope_parameters is not None


def failures(
    manifest: AdapterManifest, evaluations: Sequence[Evaluation], tolerance: float, *, trusts_keys: bool = False
) -> tuple[str, ...]:
    """The objections to an alias, one sentence each; empty where the alias is granted.

    At the adapter's context, its perplexity must be below the base's, both with and without the adapter's RoPE. At the
    context that was extended, it may be at most a share (`tolerance`) above the perplexity of the unscaled base.

    `evaluations` are sorted from the oldest to the latest; what clients have reported counts where the gate
    `trusts_keys`. Values are compared where they were measured on the same tokens in the same windows; of several such
    sets the latest counts.
    """
    if not is_gated(manifest):
        return ()
    evaluations = [e for e in evaluations if trusts_keys or e.measured_by is None]
    own, native = manifest.context_length, manifest.original_context_length
    return (*_at_its_own(evaluations, own), *_at_the_native(evaluations, native, tolerance))


def _at_its_own(evaluations: Sequence[Evaluation], context: int) -> list[str]:
    where = f"at its own context of {context:,} tokens"
    found = _measured(evaluations, context, ("adapter", "base", "base_scaled"))
    if not found:
        return [f"{where} adapter, base and base under its RoPE have not been measured on the same data"]
    adapter = found["adapter"]
    return [
        f"{where} its perplexity {adapter.value:.4g} is not below {found[subject].value:.4g} of {_NAMES[subject]} "
        f"({_data(adapter)})"
        for subject in ("base", "base_scaled")
        if not adapter.value < found[subject].value
    ]


def _at_the_native(evaluations: Sequence[Evaluation], context: int | None, tolerance: float) -> list[str]:
    if context is None:
        return ["its manifest does not say which context was extended: publish it again"]
    where = f"at the native context of {context:,} tokens"
    found = _measured(evaluations, context, ("adapter", "base"))
    if not found:
        return [f"{where} adapter and base have not been measured on the same data"]
    adapter, base = found["adapter"], found["base"]
    if adapter.value <= (1 + tolerance) * base.value:
        return []
    return [
        f"{where} its perplexity {adapter.value:.4g} is {adapter.value / base.value - 1:.1%} above {base.value:.4g} of "
        f"the base ({_data(adapter)}); {tolerance:.0%} is allowed"
    ]


def _measured(
    evaluations: Sequence[Evaluation], context: int, subjects: tuple[Subject, ...]
) -> Mapping[Subject, Evaluation]:
    """Evaluations by subject, from the set that was measured last and has all `subjects`; empty where none has."""
    sets: dict[tuple[object, ...], dict[Subject, Evaluation]] = {}
    for e in evaluations:
        if e.metric == PERPLEXITY and e.context_length == context:
            key = (e.dataset, e.data_sha256, e.stride, e.count)
            sets[key] = sets.pop(key, {}) | {e.subject: e}  # moves to the end: measured last
    complete = (found for found in reversed(sets.values()) if found.keys() >= set(subjects))
    return next(complete, {})


def _data(e: Evaluation) -> str:
    windows = "" if e.count is None else f", {e.count} windows"
    return f"{e.dataset}{windows}"


# -- rows of canaries -------------------------------------------------------------------------------------------------

_stable, _new = versions.alias("stable"), versions.alias("new")
_STATES = (
    sa.select(canaries, _stable.c.version.label("stable"), _new.c.version)
    .join(_stable, _stable.c.id == canaries.c.stable_id)
    .join(_new, _new.c.id == canaries.c.version_id)
    .order_by(canaries.c.ended_at.is_not(None), canaries.c.id.desc())
)


def _load_states(c: sa.Connection, *where: sa.ColumnElement[bool], limit: int | None = None) -> list[CanaryState]:
    """Canaries for which the conditions hold: those that run, then the newest first."""
    return [_state(row) for row in c.execute(_STATES.where(*where).limit(limit))]


def _running(adapter_id: int, alias: str) -> sa.ColumnElement[bool]:
    return sa.and_(canaries.c.adapter_id == adapter_id, canaries.c.alias == alias, canaries.c.ended_at.is_(None))


def _end_running(
    c: sa.Connection,
    adapter_id: int,
    alias: str,
    revision: int,
    outcome: CanaryOutcome,
    reason: str | None = None,
    target: int | None = None,
) -> CanaryState | None:
    """Give all requests of the alias to the version that it points at, and the alias this revision. A canary that the
    alias moves to (`target`) is promoted, whatever `outcome` says.

    Returns the canary that ran until now; None: there was none, and nothing has changed.
    """
    found = _load_states(c, _running(adapter_id, alias))
    if not found:
        return None
    outcome = "promoted" if found[0].version == target else outcome
    end = {"ended_at": now(), "outcome": outcome, "reason": reason}
    c.execute(canaries.update().where(canaries.c.id == found[0].id).values(end))
    c.execute(aliases.update().where(alias_is(adapter_id, alias)).values(revision=revision))
    return found[0]


def _read_reports(text: str) -> dict[str, CanaryCounts]:
    """Gateway → what it has counted so far."""
    return {gateway: CanaryCounts.of_json(fields) for gateway, fields in json.loads(text).items()}


def _state(row: sa.Row[Any]) -> CanaryState:
    return CanaryState(
        id=row.id,
        alias=row.alias,
        stable=row.stable,
        version=row.version,
        percent=row.percent,
        bounds=CanaryBounds.model_validate_json(row.bounds),
        counts=sum(_read_reports(row.reports).values(), CanaryCounts()),
        created_at=utc(row.created_at),
        ended_at=None if row.ended_at is None else utc(row.ended_at),
        outcome=row.outcome,
        reason=row.reason,
    )


# -- operations -------------------------------------------------------------------------------------------------------


@dataclass
class Aliases:
    """The catalog's operations on aliases."""

    db: Database

    def move(
        self,
        name: str,
        alias: str,
        version: int,
        *,
        expected: int | None = None,
        expected_revision: int | None = None,
        no_gate: str | None = None,
    ) -> AliasResource:
        """Point `alias` at `version`, and end its canary. If it points there already, it does not move.

        `expected` is the version that it must point at now, `expected_revision` the revision that it must have now; 0
        means that it must not be set. `no_gate` is a reason to override the gate's refusal; it is recorded if the gate
        refuses.

        Raises ConflictError or RevisionConflict where the alias is not as expected, AdapterNotFound where there is no
        such name or version, and GateRefused where the gate refuses the alias.
        """
        check_alias(alias)
        with self.db.changing() as c:
            revision = next_revision(c)
            adapter_id, entry = load_entry(c, self.db.principal, name, to_change=True)
            name = entry.name
            entry.select(str(version))
            current = entry.aliases.get(alias, 0)
            if expected is not None and current != expected:
                raise ConflictError(f"{_where(name, alias, current)}, not {expected or 'unset'}: look again")
            _check_revision(c, adapter_id, name, alias, expected_revision)
            where = (self.db, c, adapter_id, entry.tenant, name, alias)
            if move_alias(*where, version, revision, no_gate) or _end(*where, revision):
                count_change(c, adapter_id)
            return _states(c, adapter_id, name)[alias]

    def rollback(self, name: str, alias: str = DEFAULT_ALIAS, *, expected_revision: int | None = None) -> AliasResource:
        """Point `alias` at its target before the last move; where it has a canary, end that instead. Each further
        rollback goes one move further back.

        Raises ConflictError where there is no earlier target, AdapterNotFound where name or alias do not exist, and
        RevisionConflict as `promote` does.
        """
        check_alias(alias)
        with self.db.changing() as c:
            revision = next_revision(c)
            adapter_id, entry = load_entry(c, self.db.principal, name, to_change=True)
            name = entry.name
            _check_revision(c, adapter_id, name, alias, expected_revision)
            current = entry.select(alias).version
            if _end(self.db, c, adapter_id, entry.tenant, name, alias, revision):
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
            target = {"version_id": version_id, "revision": revision}
            c.execute(aliases.update().where(alias_is(adapter_id, alias)).values(target))
            log(c, self.db.actor, "rollback", f"{name}@{alias}", tenant=entry.tenant, version=version, previous=current)
            count_change(c, adapter_id)
            return _states(c, adapter_id, name)[alias]

    def delete(self, name: str, alias: str, *, expected_revision: int | None = None) -> None:
        """Delete `alias` and its stack of earlier targets. Versions stay.

        Raises AdapterNotFound where name or alias do not exist, and RevisionConflict as `promote` does.
        """
        check_alias(alias)
        with self.db.changing() as c:
            revision = next_revision(c)
            adapter_id, entry = load_entry(c, self.db.principal, name, to_change=True)
            name = entry.name
            _check_revision(c, adapter_id, name, alias, expected_revision)
            version = entry.select(alias).version
            _end(self.db, c, adapter_id, entry.tenant, name, alias, revision)
            c.execute(aliases.delete().where(alias_is(adapter_id, alias)))
            c.execute(alias_moves.update().where(_not_undone(adapter_id, alias)).values(undone=True))
            log(c, self.db.actor, "delete_alias", f"{name}@{alias}", tenant=entry.tenant, version=version)
            count_change(c, adapter_id)

    def of(self, name: str) -> tuple[AliasResource, ...]:
        """All aliases of one name, sorted. Raises AdapterNotFound where there is no such name."""
        with self.db.reading() as c:
            adapter_id, entry = load_entry(c, self.db.principal, name)
            return tuple(_states(c, adapter_id, entry.name).values())

    def get(self, name: str, alias: str) -> AliasResource:
        """One alias. Raises AdapterNotFound where there is no such name or alias."""
        states = {state.alias: state for state in self.of(name)}
        if alias not in states:
            raise AdapterNotFound(
                f"adapter {name!r} has no alias {alias!r}; its aliases: {', '.join(states) or 'none'}"
            )
        return states[alias]


def move_alias(
    db: Database,
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
    against = _check_gate(db, load_version(c, name, adapter_id, version), alias, no_gate)
    canary = _end_running(c, adapter_id, alias, revision, "moved", target=version)
    target = {"version_id": version_id, "revision": revision}
    if current is None:
        c.execute(aliases.insert().values(adapter_id=adapter_id, alias=alias, **target))
    else:
        c.execute(aliases.update().where(alias_is(adapter_id, alias)).values(target))
    move = {"adapter_id": adapter_id, "alias": alias, "version_id": version_id, "undone": False}
    c.execute(alias_moves.insert().values(move | {"no_gate": no_gate if against else None, "created_at": now()}))
    detail = {"no_gate": no_gate, "against": against} if against else {}
    ended = {} if canary is None else {"canary": canary.version}
    log(c, db.actor, "promote", f"{name}@{alias}", tenant=tenant, version=version, **detail, **ended)
    return True


def _end(db: Database, c: sa.Connection, adapter_id: int, tenant: str, name: str, alias: str, revision: int) -> bool:
    """End the alias's canary, as `move_alias` moves; False: it has none."""
    canary = _end_running(c, adapter_id, alias, revision, "ended")
    if canary is not None:
        log(c, db.actor, "end_canary", f"{name}@{alias}", tenant=tenant, version=canary.version)
    return canary is not None


def _check_gate(db: Database, version: AdapterVersion, alias: str, no_gate: str | None) -> tuple[str, ...]:
    """The gate's objections that `no_gate` overrides. Raises GateRefused where there are some and no reason."""
    against = failures(version.manifest, version.evaluations, db.gate_tolerance, trusts_keys=db.gate_trusts_keys)
    if against and no_gate is None:
        raise GateRefused(
            f"alias {alias!r} is refused to {version.label}: {'; '.join(against)}. "
            f"Measure it (`loray eval perplexity {version.label} --compare --data FILE`), train it further, "
            "or give the reason why it needs no gate (--no-gate, no_gate)"
        )
    return against


def _check_revision(c: sa.Connection, adapter_id: int, name: str, alias: str, expected: int | None) -> None:
    if expected is None:
        return
    state = _states(c, adapter_id, name).get(alias)
    revision, version = (state.revision, state.version) if state else (0, 0)
    if revision != expected:
        wanted = f"revision {expected}" if expected else "unset"
        raise RevisionConflict(f"{_where(name, alias, version)} with revision {revision}, not {wanted}: look again")


def _states(c: sa.Connection, adapter_id: int, name: str) -> dict[str, AliasResource]:
    """States by alias, sorted."""
    rows = c.execute(
        sa.select(aliases.c.alias, versions.c.version, versions.c.digest, aliases.c.revision)
        .join(versions, versions.c.id == aliases.c.version_id)
        .where(aliases.c.adapter_id == adapter_id)
        .order_by(aliases.c.alias)
    )
    running = load_canaries(c, adapter_id).get(adapter_id, ())
    by_alias = {canary.alias: canary for canary in running}
    return {
        row.alias: AliasResource(name=name, **row._asdict(), weights=weights_of(row.version, by_alias.get(row.alias)))
        for row in rows
    }


def _where(name: str, alias: str, version: int) -> str:
    return f"alias {alias!r} of {name!r} " + (f"points at version {version}" if version else "is not set")


def _not_undone(adapter_id: int, alias: str) -> sa.ColumnElement[bool]:
    return sa.and_(alias_moves.c.adapter_id == adapter_id, alias_moves.c.alias == alias, ~alias_moves.c.undone)


_MAX_KNOWN = 100  # canaries of one name that are listed


class EndedCanary(NamedTuple):
    """A canary that a report has ended: `label` is its `name@version`, `model` the `name@alias` that had it."""

    label: str
    model: str
    bound: Bound
    reason: str


class ReportAnswer(NamedTuple):
    """`over`: ids of canaries that do not run any more; `ended`: those of them that this report has ended."""

    over: frozenset[int]
    ended: tuple[EndedCanary, ...]


@dataclass
class Canaries:
    """The catalog's operations on canaries.

    Gateways report what they have counted since a canary began; the catalog adds it up and decides, in one transaction,
    so that all of them see the same end.
    """

    db: Database

    def set(
        self,
        name: str,
        alias: str,
        version: int,
        percent: int,
        *,
        bounds: CanaryBounds | None = None,
        expected_revision: int | None = None,
        no_gate: str | None = None,
    ) -> CanaryState:
        """Give `percent` of the requests of `alias` to `version`, or change share or bounds of the canary that runs.

        `bounds` None: those that it has, else the defaults. `expected_revision` and `no_gate` are those of `promote`;
        the gate is asked when a canary starts or its share grows.

        Raises AdapterNotFound where name, alias or version do not exist, SpecError for a share outside of 1 to 99,
        ConflictError where the alias points at the version, has another canary, or the version is of another base than
        the stable one; RevisionConflict and GateRefused as `promote` does.
        """
        check_alias(alias)
        if not 1 <= percent <= 99:
            raise SpecError(f"a canary gets 1 to 99 % of the requests, not {percent}; promote gives it all")
        with self.db.changing() as c:
            revision = next_revision(c)
            adapter_id, entry = load_entry(c, self.db.principal, name, to_change=True)
            name = entry.name
            stable, new = entry.select(alias), entry.select(str(version))
            _check_revision(c, adapter_id, name, alias, expected_revision)
            if stable.version == version:
                raise ConflictError(f"alias {alias!r} of {name!r} points at version {version} already")
            if stable.base_fingerprint != new.base_fingerprint:
                raise ConflictError(f"{new.label} and {stable.label} are of different bases: no server has both")
            before = next(iter(_load_states(c, _running(adapter_id, alias))), None)
            if before is not None and before.version != version:
                raise ConflictError(
                    f"version {before.version} is the canary of {name}@{alias}: promote or end it before another"
                )
            grows = before is None or percent > before.percent
            new_version = load_version(c, name, adapter_id, version)
            against = _check_gate(self.db, new_version, alias, no_gate) if grows else ()
            bounds = bounds or (before.bounds if before else CanaryBounds())
            if before is not None and (before.percent, before.bounds) == (percent, bounds):
                return before
            values = {"percent": percent, "bounds": bounds.model_dump_json()}
            if before is not None:
                c.execute(canaries.update().where(canaries.c.id == before.id).values(values))
            else:
                numbers = {"stable_id": stable.version, "version_id": version}
                ids = {column: version_id_of(c, adapter_id, number) for column, number in numbers.items()}
                row = {"id": revision, "adapter_id": adapter_id, "alias": alias, "reports": "{}"}
                c.execute(canaries.insert().values(row | ids | values | {"created_at": now()}))
            c.execute(aliases.update().where(alias_is(adapter_id, alias)).values(revision=revision))
            detail = {"version": version, "stable": stable.version, "percent": percent, "bounds": bounds.model_dump()}
            override = {"no_gate": no_gate, "against": against} if against else {}
            log(c, self.db.actor, "canary", f"{name}@{alias}", tenant=entry.tenant, **detail, **override)
            count_change(c, adapter_id)
            return _load_states(c, _running(adapter_id, alias))[0]

    def end(self, name: str, alias: str = DEFAULT_ALIAS, *, expected_revision: int | None = None) -> CanaryState:
        """Give all requests of `alias` to its stable version again.

        Raises AdapterNotFound as `alias`, NotFoundError where no canary runs, and RevisionConflict as `promote` does.
        """
        check_alias(alias)
        with self.db.changing() as c:
            revision = next_revision(c)
            adapter_id, entry = load_entry(c, self.db.principal, name, to_change=True)
            entry.select(alias)
            _check_revision(c, adapter_id, entry.name, alias, expected_revision)
            if not _end(self.db, c, adapter_id, entry.tenant, entry.name, alias, revision):
                raise _no_canary(entry.name, alias)
            count_change(c, adapter_id)
            return _load_states(c, canaries.c.adapter_id == adapter_id, canaries.c.alias == alias, limit=1)[0]

    def get(self, name: str, alias: str = DEFAULT_ALIAS) -> CanaryState:
        """The canary of an alias that runs, else the last one. Raises AdapterNotFound, NotFoundError, and
        PermissionDenied for another tenant's adapter: what was counted speaks of that tenant's requests.
        """
        with self.db.reading() as c:
            adapter_id, entry = load_entry(c, self.db.principal, name, to_change=True)
            found = _load_states(c, canaries.c.adapter_id == adapter_id, canaries.c.alias == alias, limit=1)
        if not found:
            raise _no_canary(entry.name, alias)
        return found[0]

    def of(self, name: str) -> tuple[CanaryState, ...]:
        """Canaries of all aliases of a name, the running ones and then the newest first; none of another tenant's.

        Raises AdapterNotFound.
        """
        with self.db.reading() as c:
            adapter_id, entry = load_entry(c, self.db.principal, name)
            return known_canaries(c, self.db.principal, adapter_id, entry)

    def report(self, gateway: str, counted: Mapping[int, CanaryCounts]) -> ReportAnswer:
        """Keep what a gateway has counted of each canary since it began, by the canary's id. It replaces the gateway's
        last report, so that one which comes twice counts once.

        A canary that is outside of its bounds now is ended, with the reason.
        """
        over: set[int] = set()
        ended: list[EndedCanary] = []
        with self.db.changing() as c:
            revision = next_revision(c)
            query = sa.select(canaries.c.reports, adapters.c.id, adapters.c.name, adapters.c.tenant)
            query = query.join(adapters, adapters.c.id == canaries.c.adapter_id).where(canaries.c.ended_at.is_(None))
            for canary_id, counts in counted.items():
                row = c.execute(query.where(canaries.c.id == canary_id)).first()
                if row is None:
                    over.add(canary_id)
                    continue
                reports = _read_reports(row.reports) | {gateway: counts}
                this = canaries.c.id == canary_id
                written = json.dumps(reports, separators=(",", ":"))
                c.execute(canaries.update().where(this).values(reports=written))
                state = _load_states(c, this)[0]
                left = breach(state.bounds, state.counts)
                if left is not None:
                    _end_running(c, row.id, state.alias, revision, "rolled_back", left.reason)
                    model, label = f"{row.name}@{state.alias}", f"{row.name}@{state.version}"
                    detail = {"version": state.version, "stable": state.stable, "reason": left.reason}
                    log(c, self.db.actor, "rollback_canary", model, tenant=row.tenant, **detail)
                    count_change(c, row.id)
                    over.add(canary_id)
                    ended.append(EndedCanary(label, model, *left))
        return ReportAnswer(frozenset(over), tuple(ended))


def known_canaries(
    c: sa.Connection, principal: Principal, adapter_id: int, entry: AdapterEntry
) -> tuple[CanaryState, ...]:
    """What `Canaries.of` tells this caller."""
    if not principal.is_admin and entry.tenant != principal.tenant:
        return ()
    return tuple(_load_states(c, canaries.c.adapter_id == adapter_id, limit=_MAX_KNOWN))


def _no_canary(name: str, alias: str) -> NotFoundError:
    return NotFoundError(f"alias {alias!r} of {name!r} has no canary; `loray adapters canary` starts one")
