"""Canaries: a share of an alias's requests for another version, until somebody ends it or it leaves its bounds.

Gateways report what they have counted since a canary began; the catalog adds it up and decides, in one transaction, so
that all of them see the same end.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import sqlalchemy as sa

from loray.catalog.aliases import Aliases, check_revision
from loray.catalog.checks import check_alias
from loray.catalog.database import reading, writing
from loray.catalog.entries import AdapterEntry
from loray.catalog.queries import (
    alias_is,
    count_change,
    load_entry,
    load_version,
    lock,
    log,
    now,
    version_id_of,
)
from loray.catalog.schema import adapters, aliases, canaries
from loray.catalog.traffic.rows import end_running, load_states, read_reports, running, write_reports
from loray.catalog.traffic.verdict import Bound, breach
from loray.errors import ConflictError, NotFoundError, SpecError
from loray.spec import DEFAULT_ALIAS, CanaryBounds, CanaryCounts, CanaryState

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


class Canaries(Aliases):
    """The catalog's operations on canaries."""

    def set_canary(
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
        with writing(self._engine) as c:
            counter = lock(c)
            adapter_id, entry = load_entry(c, self._principal, name, to_change=True)
            name = entry.name
            stable, new = entry.select(alias), entry.select(str(version))
            check_revision(c, adapter_id, name, alias, expected_revision)
            if stable.version == version:
                raise ConflictError(f"alias {alias!r} of {name!r} points at version {version} already")
            if stable.base_fingerprint != new.base_fingerprint:
                raise ConflictError(f"{new.label} and {stable.label} are of different bases: no server has both")
            found = load_states(c, running(adapter_id, alias))
            if found and found[0].stable != stable.version:  # an older loray moved the alias and left it
                self._end(c, adapter_id, entry.tenant, name, alias, counter + 1)
                found = []
            if found and found[0].version != version:
                raise ConflictError(
                    f"version {found[0].version} is the canary of {name}@{alias}: promote or end it before another"
                )
            before = found[0] if found else None
            grows = before is None or percent > before.percent
            new_version = load_version(c, name, adapter_id, version)
            against = self._check_gate(new_version, alias, no_gate) if grows else ()
            bounds = bounds or (before.bounds if before else CanaryBounds())
            if before is not None and (before.percent, before.bounds) == (percent, bounds):
                return before
            values = {"percent": percent, "bounds": bounds.model_dump_json()}
            if before is not None:
                c.execute(canaries.update().where(canaries.c.id == before.id).values(values))
            else:
                numbers = {"stable_id": stable.version, "version_id": version}
                ids = {column: version_id_of(c, adapter_id, number) for column, number in numbers.items()}
                row = {"id": counter + 1, "adapter_id": adapter_id, "alias": alias, "reports": "{}"}
                c.execute(canaries.insert().values(row | ids | values | {"created_at": now()}))
            c.execute(aliases.update().where(alias_is(adapter_id, alias)).values(revision=counter + 1))
            detail = {"version": version, "stable": stable.version, "percent": percent, "bounds": bounds.model_dump()}
            override = {"no_gate": no_gate, "against": against} if against else {}
            log(c, self._actor, "canary", f"{name}@{alias}", tenant=entry.tenant, **detail, **override)
            count_change(c, adapter_id)
            return load_states(c, running(adapter_id, alias))[0]

    def end_canary(self, name: str, alias: str = DEFAULT_ALIAS, *, expected_revision: int | None = None) -> CanaryState:
        """Give all requests of `alias` to its stable version again.

        Raises AdapterNotFound as `alias`, NotFoundError where no canary runs, and RevisionConflict as `promote` does.
        """
        check_alias(alias)
        with writing(self._engine) as c:
            counter = lock(c)
            adapter_id, entry = load_entry(c, self._principal, name, to_change=True)
            entry.select(alias)
            check_revision(c, adapter_id, entry.name, alias, expected_revision)
            if not self._end(c, adapter_id, entry.tenant, entry.name, alias, counter + 1):
                raise _no_canary(entry.name, alias)
            count_change(c, adapter_id)
            return load_states(c, canaries.c.adapter_id == adapter_id, canaries.c.alias == alias, limit=1)[0]

    def canary(self, name: str, alias: str = DEFAULT_ALIAS) -> CanaryState:
        """The canary of an alias that runs, else the last one. Raises AdapterNotFound, NotFoundError, and
        PermissionDenied for another tenant's adapter: what was counted speaks of that tenant's requests.
        """
        with reading(self._engine) as c:
            adapter_id, entry = load_entry(c, self._principal, name, to_change=True)
            found = load_states(c, canaries.c.adapter_id == adapter_id, canaries.c.alias == alias, limit=1)
        if not found:
            raise _no_canary(entry.name, alias)
        return found[0]

    def canaries(self, name: str) -> tuple[CanaryState, ...]:
        """Canaries of all aliases of a name, the running ones and then the newest first; none of another tenant's.

        Raises AdapterNotFound.
        """
        with reading(self._engine) as c:
            adapter_id, entry = load_entry(c, self._principal, name)
            return self._known(c, adapter_id, entry)

    def _known(self, c: sa.Connection, adapter_id: int, entry: AdapterEntry) -> tuple[CanaryState, ...]:
        if not self._principal.is_admin and entry.tenant != self._principal.tenant:
            return ()
        return tuple(load_states(c, canaries.c.adapter_id == adapter_id, limit=_MAX_KNOWN))

    def report_canaries(self, gateway: str, counted: Mapping[int, CanaryCounts]) -> ReportAnswer:
        """What a gateway has counted of each canary since it began, by the canary's id. It replaces its last report, so
        that one which comes twice counts once.

        A canary that is outside of its bounds now is ended, with the reason.
        """
        over: set[int] = set()
        ended: list[EndedCanary] = []
        with writing(self._engine) as c:
            counter = lock(c)
            query = sa.select(canaries.c.reports, adapters.c.id, adapters.c.name, adapters.c.tenant)
            query = query.join(adapters, adapters.c.id == canaries.c.adapter_id).where(canaries.c.ended_at.is_(None))
            for canary_id, counts in counted.items():
                row = c.execute(query.where(canaries.c.id == canary_id)).first()
                if row is None:
                    over.add(canary_id)
                    continue
                reports = read_reports(row.reports) | {gateway: counts}
                this = canaries.c.id == canary_id
                c.execute(canaries.update().where(this).values(reports=write_reports(reports)))
                state = load_states(c, this)[0]
                left = breach(state.bounds, state.counts)
                if left is not None:
                    end_running(c, row.id, state.alias, counter + 1, "rolled_back", left.reason)
                    model, label = f"{row.name}@{state.alias}", f"{row.name}@{state.version}"
                    detail = {"version": state.version, "stable": state.stable, "reason": left.reason}
                    log(c, self._actor, "rollback_canary", model, tenant=row.tenant, **detail)
                    count_change(c, row.id)
                    over.add(canary_id)
                    ended.append(EndedCanary(label, model, *left))
        return ReportAnswer(frozenset(over), tuple(ended))


def _no_canary(name: str, alias: str) -> NotFoundError:
    return NotFoundError(f"alias {alias!r} of {name!r} has no canary; `loray adapters canary` starts one")
