"""Snapshots: all names in memory, and what has changed since one was taken."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import merge

import sqlalchemy as sa

from loray.catalog.entries import NUM_COMPARED, AdapterEntry, split_model, unknown_adapter
from loray.catalog.queries import load_entries, read_counter
from loray.catalog.schema import adapters, bases, versions
from loray.spec import OPERATOR, AdapterRef, Principal, meanings

ALL, PUBLIC = "*", ""  # in place of a tenant's name


@dataclass(frozen=True, slots=True)
class Changes:
    """Changes until the change counter was `counter`.

    bases      of the catalog: name → fingerprint
    adapters   id → entry of each adapter that changed; None: it does not exist any more
    templates  SHA-256 → text of the chat templates that adapters have of their own
    """

    counter: int
    bases: Mapping[str, str]
    adapters: Mapping[int, AdapterEntry | None]
    templates: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class BaseTotals:
    """The names of one base, those whose default version belongs to it, and its versions: context length → number."""

    num_adapters: int = 0
    contexts: Mapping[int, int] = field(default_factory=dict)

    @property
    def longest_context(self) -> int:
        """The longest context of all versions; 0 where there are none."""
        return max(self.contexts, default=0)


@dataclass(frozen=True, slots=True)
class CatalogSnapshot:
    """All names at one moment, immutable. `counter` is the catalog's change counter then.

    bases      name → fingerprint
    adapters   by name
    ids        adapter's id → name
    templates  SHA-256 → text of the chat templates that adapters have of their own
    totals     by the base's fingerprint
    names      by tenant, sorted: of its own adapters and those shared with it; ALL; and those that are PUBLIC
    """

    counter: int = -1
    bases: Mapping[str, str] = field(default_factory=dict)
    adapters: Mapping[str, AdapterEntry] = field(default_factory=dict)
    ids: Mapping[int, str] = field(default_factory=dict)
    templates: Mapping[str, str] = field(default_factory=dict)
    totals: Mapping[str, BaseTotals] = field(default_factory=dict)
    names: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def after(self, changes: Changes) -> CatalogSnapshot:
        """The snapshot that these changes lead to. It shares with this one what did not change.

        A copy of a dictionary of a hundred thousand names takes less than a millisecond.
        """
        before = {i: self.adapters[self.ids[i]] for i in changes.adapters if i in self.ids}
        now = {i: entry for i, entry in changes.adapters.items() if entry is not None}
        adapters, ids = self.adapters, self.ids
        if before or now:
            adapters = dict(adapters)
            for entry in before.values():  # first all that leave, since a name may pass from one to another
                del adapters[entry.name]
            adapters.update((entry.name, entry) for entry in now.values())
        if {i: entry.name for i, entry in before.items()} != {i: entry.name for i, entry in now.items()}:
            ids = dict(ids)
            for i in before:
                del ids[i]
            ids.update((i, entry.name) for i, entry in now.items())
        return replace(
            self,
            counter=changes.counter,
            bases=changes.bases,
            adapters=adapters,
            ids=ids,
            templates=changes.templates,
            totals=_totals(self.totals, before.values(), now.values()),
            names=_names(self.names, before.values(), now.values()),
        )

    def adapter(self, adapter_id: int) -> AdapterEntry | None:
        name = self.ids.get(adapter_id)
        return None if name is None else self.adapters[name]

    def find(self, model: str, principal: Principal = OPERATOR) -> AdapterRef | None:
        """`name`, `name@3` or `name@alias` → the version; None where there is none for this caller."""
        name, at, selector = model.partition("@")
        entry = self._find(name, principal)
        return None if entry is None else entry.find(selector if at else None)

    def resolve(self, model: str, principal: Principal = OPERATOR) -> AdapterRef:
        """`name`, `name@3` or `name@alias` → the version. Raises AdapterNotFound, which suggests similar names."""
        name, selector = split_model(model)
        return self.entry(name, principal).select(selector)

    def entry(self, name: str, principal: Principal = OPERATOR) -> AdapterEntry:
        """The adapter that `name` means for this caller. Raises AdapterNotFound, also for one that others alone see."""
        found = self._find(name, principal)
        if found is not None:
            return found
        near: dict[str, list[str]] = {}
        for meant in meanings(name, principal.tenant):
            beside = names_beside(self.names.get(ALL, ()), meant)
            near[meant] = [n for n in beside if self.adapters[n].exists_for(principal)]
        raise unknown_adapter(name, near, self.bases)

    def models(self, after: str | None = None, principal: Principal = OPERATOR) -> Iterator[AdapterEntry]:
        """All names of the caller, sorted; those after the name `after`."""
        lists = [self.names.get(who, ()) for who in ((ALL,) if principal.is_admin else (principal.tenant, PUBLIC))]
        begins = ((names, 0 if after is None else bisect_right(names, after)) for names in lists)
        parts = (map(names.__getitem__, range(begin, len(names))) for names, begin in begins)  # a slice copies
        return (self.adapters[name] for name in merge(*parts))

    def _find(self, name: str, principal: Principal) -> AdapterEntry | None:
        for stored in meanings(name, principal.tenant):
            entry = self.adapters.get(stored)
            if entry is not None and entry.exists_for(principal):
                return entry
        return None


def names_beside(names: Sequence[str], name: str) -> Sequence[str]:
    """At most NUM_COMPARED of the sorted names, those beside the place of `name`."""
    first = max(0, min(bisect_left(names, name) - NUM_COMPARED // 2, len(names) - NUM_COMPARED))
    return names[first : first + NUM_COMPARED]


def _names(
    names: Mapping[str, Sequence[str]], before: Iterable[AdapterEntry], now: Iterable[AdapterEntry]
) -> Mapping[str, Sequence[str]]:
    """`CatalogSnapshot.names` when these entries have left and these have come."""
    changes: dict[str, dict[str, bool]] = {}
    for entries, is_there in ((before, False), (now, True)):
        for entry in entries:
            for who in _seers(entry):
                changes.setdefault(who, {})[entry.name] = is_there
    changed: dict[str, list[str]] = {}
    for who, of in changes.items():
        known = names.get(who, ())
        places = {name: at for name in of if known[(at := bisect_left(known, name)) : at + 1] == [name]}
        came = [name for name, is_there in of.items() if is_there and name not in places]
        gone = sorted(at for name, at in places.items() if not of[name])
        if came or gone:
            changed[who] = list(known)
            for at in reversed(gone):
                del changed[who][at]
            changed[who] = sorted(changed[who] + came)
    return {who: found for who, found in {**names, **changed}.items() if found} if changed else names


def _seers(entry: AdapterEntry) -> Iterable[str]:
    """The keys of `CatalogSnapshot.names` that have the name, by `AdapterEntry.exists_for`."""
    if entry.visibility == "public":
        return (ALL, PUBLIC)
    return {ALL, entry.tenant, *entry.shared_with} if entry.visibility == "shared" else (ALL, entry.tenant)


def _totals(
    totals: Mapping[str, BaseTotals], before: Iterable[AdapterEntry], now: Iterable[AdapterEntry]
) -> Mapping[str, BaseTotals]:
    num_adapters: Counter[str] = Counter()
    contexts: Counter[tuple[str, int]] = Counter()
    for entries, sign in ((before, -1), (now, 1)):
        for entry in entries:
            num_adapters[entry.default.base_fingerprint] += sign
            for ref in entry.refs:
                contexts[ref.base_fingerprint, ref.context_length] += sign
    changed = {fingerprint: dict(of_base.contexts) for fingerprint, of_base in totals.items()}
    for (fingerprint, length), change in contexts.items():
        of_base = changed.setdefault(fingerprint, {})
        of_base[length] = of_base.get(length, 0) + change
    return {
        fingerprint: BaseTotals(
            totals.get(fingerprint, BaseTotals()).num_adapters + num_adapters[fingerprint],
            {length: count for length, count in of_base.items() if count},
        )
        for fingerprint, of_base in changed.items()
        if any(of_base.values())
    }


# -- what changed since -----------------------------------------------------------------------------------------------

_LAST_ID = 2**31 - 1  # what the column holds
_PAGE = 500  # adapters that are read at once: drivers hold Python's lock while they make the rows of a result


def changes_since(c: sa.Connection, principal: Principal, before: CatalogSnapshot, *, whole: bool = False) -> Changes:
    """The changes for the caller since the snapshot was taken; all its names where that is empty.

    A row of `adapters` is deleted only long after it was marked as deleted, so no name leaves unseen. `whole` compares
    everything, also with a snapshot of another copy of the catalog.
    """
    found: dict[int, AdapterEntry | None] = dict.fromkeys(before.ids) if whole else {}
    for ids in _changed(c, -1 if whole else before.counter):
        entries = dict(load_entries(c, principal, adapters.c.id.in_(ids)))
        for adapter_id in ids:
            entry = entries.get(adapter_id)
            if whole and entry is not None and before.adapter(adapter_id) == entry:
                del found[adapter_id]
            else:
                found[adapter_id] = entry
    return Changes(
        counter=read_counter(c),
        bases={row.name: row.fingerprint for row in c.execute(sa.select(bases))},
        adapters=found,
        templates=_templates(c, before.templates),
    )


def _changed(c: sa.Connection, since: int) -> Iterator[list[int]]:
    """Ids of the adapters that changed after `since`, in pages."""
    place = sa.tuple_(adapters.c.changed_at, adapters.c.id)
    query = sa.select(adapters.c.changed_at, adapters.c.id).order_by(adapters.c.changed_at, adapters.c.id).limit(_PAGE)
    last = (since, _LAST_ID)
    while rows := c.execute(query.where(place > sa.tuple_(*last))).all():
        yield [row.id for row in rows]
        last = (rows[-1].changed_at, rows[-1].id)


def _templates(c: sa.Connection, known: Mapping[str, str]) -> Mapping[str, str]:
    """SHA-256 → text of all adapters' chat templates. Those in `known` are not read again."""
    used = c.scalars(sa.select(versions.c.chat_template).where(versions.c.chat_template.is_not(None)).distinct()).all()
    if known.keys() == set(used):
        return known
    found = {sha256: known.get(sha256) for sha256 in used}
    for sha256 in [sha256 for sha256, text in found.items() if text is None]:
        query = sa.select(versions.c.manifest).where(versions.c.chat_template == sha256).limit(1)
        found[sha256] = json.loads(c.execute(query).scalar_one())["chat_template"]
    return {sha256: text for sha256, text in found.items() if text is not None}
