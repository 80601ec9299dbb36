"""The catalog's operations on aliases and their canaries, and the gate that some adapters must pass before an alias."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import sqlalchemy as sa

from loray.catalog.audit_chain import log
from loray.catalog.database import Database
from loray.catalog.entries import AdapterEntry, AdapterVersion, AliasMove, check_alias, weights_of
from loray.catalog.queries import (
    alias_is,
    count_change,
    load_canaries,
    load_entry,
    load_version,
    next_revision,
    now,
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
        created_at=row.created_at,
        ended_at=row.ended_at,
        outcome=row.outcome,
        reason=row.reason,
    )


# -- operations -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AliasWrite:
    """An alias of the tenant's adapter `name`, in a transaction that changes it. `revision` is the alias's then."""

    db: Database
    c: sa.Connection
    adapter_id: int
    tenant: str
    name: str
    alias: str
    revision: int

    def state(self) -> AliasResource:
        return _states(self.c, self.adapter_id, self.name)[self.alias]

    def check_revision(self, expected: int | None) -> None:
        """Raise RevisionConflict unless the alias has this revision now; 0: it must not be set, None: it may be any."""
        if expected is None:
            return
        state = _states(self.c, self.adapter_id, self.name).get(self.alias)
        revision, version = (state.revision, state.version) if state else (0, 0)
        if revision != expected:
            wanted = f"revision {expected}" if expected else "unset"
            raise RevisionConflict(f"{self.told(version)} with revision {revision}, not {wanted}: look again")

    def told(self, version: int) -> str:
        """Where the alias points, for messages; 0: nowhere."""
        return f"alias {self.alias!r} of {self.name!r} " + (f"points at version {version}" if version else "is not set")

    def move(self, version: int, no_gate: str | None) -> bool:
        """Point the alias at the version; False: it does already. Raises GateRefused."""
        version_id = version_id_of(self.c, self.adapter_id, version)
        this = alias_is(self.adapter_id, self.alias)
        current = self.c.execute(sa.select(aliases.c.version_id).where(this)).scalar()
        if current == version_id:
            return False
        against = self.check_gate(load_version(self.c, self.name, self.adapter_id, version), no_gate)
        canary = self.end_canary("moved", target=version)
        if current is None:
            row = {"adapter_id": self.adapter_id, "alias": self.alias, "version_id": version_id}
            self.c.execute(aliases.insert().values(row | {"revision": self.revision}))
        else:
            self.update(version_id=version_id)
        move = {"adapter_id": self.adapter_id, "alias": self.alias, "version_id": version_id, "undone": False}
        move |= {"no_gate": no_gate if against else None, "created_at": now()}
        self.c.execute(alias_moves.insert().values(move))
        ended = {} if canary is None else {"canary": canary.version}
        self.log("promote", version=version, **_overridden(no_gate, against), **ended)
        return True

    def update(self, **values: Any) -> None:
        """Give the alias these values and its revision."""
        this = alias_is(self.adapter_id, self.alias)
        self.c.execute(aliases.update().where(this).values(values | {"revision": self.revision}))

    def check_gate(self, version: AdapterVersion, no_gate: str | None) -> tuple[str, ...]:
        """The gate's objections that `no_gate` overrides. Raises GateRefused where there are some and no reason."""
        tolerance, trusts_keys = self.db.gate_tolerance, self.db.gate_trusts_keys
        against = failures(version.manifest, version.evaluations, tolerance, trusts_keys=trusts_keys)
        if against and no_gate is None:
            raise GateRefused(
                f"alias {self.alias!r} is refused to {version.label}: {'; '.join(against)}. "
                f"Measure it (`loray eval perplexity {version.label} --compare --data FILE`), train it further, "
                "or give the reason why it needs no gate (--no-gate, no_gate)"
            )
        return against

    def canary(self) -> CanaryState | None:
        """The one that runs."""
        mine = (canaries.c.adapter_id == self.adapter_id, canaries.c.alias == self.alias)
        return next(iter(_load_states(self.c, *mine, canaries.c.ended_at.is_(None))), None)

    def end_canary(
        self, outcome: CanaryOutcome, reason: str | None = None, target: int | None = None
    ) -> CanaryState | None:
        """Give all requests to the version that the alias points at. A canary that the alias moves to (`target`) is
        promoted, whatever `outcome` says. Returns the canary that ran until now; None: there was none, and nothing has
        changed.
        """
        found = self.canary()
        if found is not None:
            outcome = "promoted" if found.version == target else outcome
            end = {"ended_at": now(), "outcome": outcome, "reason": reason}
            self.c.execute(canaries.update().where(canaries.c.id == found.id).values(end))
            self.update()
            if outcome == "ended":
                self.log("end_canary", version=found.version)
        return found

    def log(self, action: str, **detail: Any) -> None:
        log(self.c, self.db.actor, action, f"{self.name}@{self.alias}", tenant=self.tenant, **detail)


@contextmanager
def _changing(
    db: Database, name: str, alias: str, expected_revision: int | None
) -> Iterator[tuple[AliasWrite, AdapterEntry]]:
    """A transaction that changes the alias, if it has the expected revision, and the adapter as it is before."""
    check_alias(alias)
    with db.changing() as c:
        adapter_id, entry = load_entry(c, db.principal, name, to_change=True)
        write = AliasWrite(db, c, adapter_id, entry.tenant, entry.name, alias, next_revision(c))
        write.check_revision(expected_revision)
        yield write, entry


@dataclass
class Aliases:
    """The catalog's operations on aliases.

    `expected_revision` is the revision that an alias must have now; 0 means that it must not be set: else
    RevisionConflict. They raise AdapterNotFound where there is no such name.
    """

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

        `expected` is the version that it must point at now; 0 means that it must not be set. `no_gate` is a reason to
        override the gate's refusal; it is recorded if the gate refuses.

        Raises ConflictError where the alias is not as expected, AdapterNotFound where there is no such version, and
        GateRefused where the gate refuses the alias.
        """
        with _changing(self.db, name, alias, expected_revision) as (write, entry):
            entry.select(str(version))
            current = entry.aliases.get(alias, 0)
            if expected is not None and current != expected:
                raise ConflictError(f"{write.told(current)}, not {expected or 'unset'}: look again")
            if write.move(version, no_gate) or write.end_canary("ended"):
                count_change(write.c, write.adapter_id)
            return write.state()

    def rollback(self, name: str, alias: str = DEFAULT_ALIAS, *, expected_revision: int | None = None) -> AliasResource:
        """Point `alias` at its target before the last move; where it has a canary, end that instead. Each further
        rollback goes one move further back.

        Raises ConflictError where there is no earlier target, AdapterNotFound where there is no such alias.
        """
        with _changing(self.db, name, alias, expected_revision) as (write, entry):
            current = entry.select(alias).version
            if write.end_canary("ended") is None:
                stack = write.c.execute(
                    sa.select(alias_moves.c.id, alias_moves.c.version_id, versions.c.version)
                    .join(versions, versions.c.id == alias_moves.c.version_id)
                    .where(_not_undone(write.adapter_id, alias))
                    .order_by(alias_moves.c.id.desc())
                    .limit(2)
                ).all()
                if len(stack) < 2:
                    raise ConflictError(
                        f"alias {alias!r} of {entry.name!r} has no earlier target than version {current}; "
                        "promote another version instead"
                    )
                (move_id, _, _), (_, version_id, version) = stack
                write.c.execute(alias_moves.update().where(alias_moves.c.id == move_id).values(undone=True))
                write.update(version_id=version_id)
                write.log("rollback", version=version, previous=current)
            count_change(write.c, write.adapter_id)
            return write.state()

    def delete(self, name: str, alias: str, *, expected_revision: int | None = None) -> None:
        """Delete `alias` and its stack of earlier targets. Versions stay. Raises AdapterNotFound where there is no such
        alias.
        """
        with _changing(self.db, name, alias, expected_revision) as (write, entry):
            version = entry.select(alias).version
            write.end_canary("ended")
            write.c.execute(aliases.delete().where(alias_is(write.adapter_id, alias)))
            write.c.execute(alias_moves.update().where(_not_undone(write.adapter_id, alias)).values(undone=True))
            write.log("delete_alias", version=version)
            count_change(write.c, write.adapter_id)

    def of(self, name: str) -> tuple[AliasResource, ...]:
        """All aliases of one name, sorted."""
        with self.db.reading() as c:
            adapter_id, entry = load_entry(c, self.db.principal, name)
            return tuple(_states(c, adapter_id, entry.name).values())

    def get(self, name: str, alias: str) -> AliasResource:
        """One alias. Raises AdapterNotFound where there is no such alias."""
        states = {state.alias: state for state in self.of(name)}
        if alias not in states:
            known = ", ".join(states) or "none"
            raise AdapterNotFound(f"adapter {name!r} has no alias {alias!r}; its aliases: {known}")
        return states[alias]

    def moves(self, name: str) -> tuple[AliasMove, ...]:
        """How the aliases of one name moved, in the order of time."""
        query = sa.select(alias_moves, versions.c.version).order_by(alias_moves.c.id)
        query = query.join(versions, versions.c.id == alias_moves.c.version_id)
        with self.db.reading() as c:
            mine = alias_moves.c.adapter_id == load_entry(c, self.db.principal, name)[0]
            rows = c.execute(query.where(mine)).all()
        return tuple(AliasMove(row.alias, row.version, row.undone, row.created_at, row.no_gate) for row in rows)


def _states(c: sa.Connection, adapter_id: int, name: str) -> dict[str, AliasResource]:
    """States by alias, sorted."""
    rows = c.execute(
        sa.select(aliases.c.alias, versions.c.version, versions.c.digest, aliases.c.revision)
        .join(versions, versions.c.id == aliases.c.version_id)
        .where(aliases.c.adapter_id == adapter_id)
        .order_by(aliases.c.alias)
    )
    running = {canary.alias: canary for canary in load_canaries(c, adapter_id).get(adapter_id, ())}
    return {
        row.alias: AliasResource(name=name, **row._asdict(), weights=weights_of(row.version, running.get(row.alias)))
        for row in rows
    }


def _overridden(no_gate: str | None, against: tuple[str, ...]) -> dict[str, Any]:
    """Say for the audit log that a gate was overridden, and against what."""
    return {"no_gate": no_gate, "against": against} if against else {}


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

        `bounds` None: those that it has, else the defaults. `expected_revision` and `no_gate` are those of
        `Aliases.move`; the gate is asked when a canary starts or its share grows.

        Raises AdapterNotFound where name, alias or version do not exist, SpecError for a share outside of 1 to 99,
        ConflictError where the alias points at the version, has another canary, or the version is of another base than
        the stable one; RevisionConflict and GateRefused as `Aliases.move` does.
        """
        if not 1 <= percent <= 99:
            raise SpecError(f"a canary gets 1 to 99 % of the requests, not {percent}; promote gives it all")
        with _changing(self.db, name, alias, expected_revision) as (write, entry):
            c, adapter_id, name = write.c, write.adapter_id, entry.name
            stable, new = entry.select(alias), entry.select(str(version))
            if stable.version == version:
                raise ConflictError(f"alias {alias!r} of {name!r} points at version {version} already")
            if stable.base_fingerprint != new.base_fingerprint:
                raise ConflictError(f"{new.label} and {stable.label} are of different bases: no server has both")
            before = write.canary()
            if before is not None and before.version != version:
                raise ConflictError(
                    f"version {before.version} is the canary of {name}@{alias}: promote or end it before another"
                )
            against: tuple[str, ...] = ()
            if before is None or percent > before.percent:
                against = write.check_gate(load_version(c, name, adapter_id, version), no_gate)
            bounds = bounds or (before.bounds if before else CanaryBounds())
            if before is not None and (before.percent, before.bounds) == (percent, bounds):
                return before
            values = {"percent": percent, "bounds": bounds.model_dump_json()}
            if before is not None:
                c.execute(canaries.update().where(canaries.c.id == before.id).values(values))
            else:
                numbers = {"stable_id": stable.version, "version_id": version}
                ids = {column: version_id_of(c, adapter_id, number) for column, number in numbers.items()}
                row = {"id": write.revision, "adapter_id": adapter_id, "alias": alias, "reports": "{}"}
                c.execute(canaries.insert().values(row | ids | values | {"created_at": now()}))
            write.update()
            detail = {"version": version, "stable": stable.version, "percent": percent, "bounds": bounds.model_dump()}
            write.log("canary", **detail, **_overridden(no_gate, against))
            count_change(c, adapter_id)
            (state,) = _load_states(c, canaries.c.id == (write.revision if before is None else before.id))
            return state

    def end(self, name: str, alias: str = DEFAULT_ALIAS, *, expected_revision: int | None = None) -> CanaryState:
        """Give all requests of `alias` to its stable version again.

        Raises AdapterNotFound as `Aliases.get`, NotFoundError where no canary runs, and RevisionConflict.
        """
        with _changing(self.db, name, alias, expected_revision) as (write, entry):
            entry.select(alias)
            ended = write.end_canary("ended")
            if ended is None:
                raise _no_canary(entry.name, alias)
            count_change(write.c, write.adapter_id)
            (state,) = _load_states(write.c, canaries.c.id == ended.id)
            return state

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
            if not self.db.principal.is_admin and entry.tenant != self.db.principal.tenant:
                return ()
            return tuple(_load_states(c, canaries.c.adapter_id == adapter_id, limit=_MAX_KNOWN))

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
                    write = AliasWrite(self.db, c, row.id, row.tenant, row.name, state.alias, revision)
                    write.end_canary("rolled_back", left.reason)
                    write.log("rollback_canary", version=state.version, stable=state.stable, reason=left.reason)
                    count_change(c, row.id)
                    over.add(canary_id)
                    label, model = f"{row.name}@{state.version}", f"{row.name}@{state.alias}"
                    ended.append(EndedCanary(label, model, *left))
        return ReportAnswer(frozenset(over), tuple(ended))


def _no_canary(name: str, alias: str) -> NotFoundError:
    return NotFoundError(f"alias {alias!r} of {name!r} has no canary; `loray adapters canary` starts one")
