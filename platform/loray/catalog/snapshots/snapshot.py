"""Snapshots of the catalog, which resolve names in memory, and the changes that lead from one to the next."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from heapq import merge

from loray.catalog.checks import NUM_COMPARED, unknown_adapter
from loray.catalog.entries import AdapterEntry, split_model
from loray.catalog.snapshots.blocks import SortedMap
from loray.spec import OPERATOR, AdapterRef, Principal, meanings

PUBLIC = ""  # in place of a tenant's name


@dataclass(frozen=True, slots=True)
class Changes:
    """What changed until the change counter was `counter`.

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
    """Of one base: names whose default version belongs to it; context length → number of versions."""

    num_adapters: int = 0
    contexts: Mapping[int, int] = field(default_factory=dict)

    @property
    def longest_context(self) -> int:
        """Of all versions; 0 where there are none."""
        return max(self.contexts, default=0)


@dataclass(frozen=True, slots=True)
class CatalogSnapshot:
    """All names at one moment, immutable. `counter` is the catalog's change counter then.

    bases      name → fingerprint
    adapters   by name
    names      adapter's id → name
    templates  SHA-256 → text of the chat templates that adapters have of their own
    totals     by the base's fingerprint
    seen       by tenant: its own adapters and those shared with it, by name; those that are public are under PUBLIC
    """

    counter: int = -1
    bases: Mapping[str, str] = field(default_factory=dict)
    adapters: SortedMap[str, AdapterEntry] = field(default_factory=SortedMap)
    names: SortedMap[int, str] = field(default_factory=SortedMap)
    templates: Mapping[str, str] = field(default_factory=dict)
    totals: Mapping[str, BaseTotals] = field(default_factory=dict)
    seen: Mapping[str, SortedMap[str, AdapterEntry]] = field(default_factory=dict)

    def after(self, changes: Changes) -> CatalogSnapshot:
        """The snapshot that these changes lead to. It shares with this one what did not change."""
        renamed: dict[int, str | None] = {}
        entries: dict[str, AdapterEntry | None] = {}
        before: list[AdapterEntry] = []
        for adapter_id in changes.adapters:  # first all that leave, since a name may pass from one to another
            name = self.names.find(adapter_id)
            if name is not None:
                before.append(self.adapters[name])
                entries[name] = renamed[adapter_id] = None
        for adapter_id, entry in changes.adapters.items():
            if entry is not None:
                entries[entry.name], renamed[adapter_id] = entry, entry.name
        now = [entry for entry in entries.values() if entry is not None]
        stays = {i: name for i, name in renamed.items() if name is None or self.names.find(i) != name}
        return replace(
            self,
            counter=changes.counter,
            bases=changes.bases,
            adapters=self.adapters.changed(entries),
            names=self.names.changed(stays),
            templates=changes.templates,
            totals=_totals(self.totals, before, now),
            seen=_seen(self.seen, before, now),
        )

    def adapter(self, adapter_id: int) -> AdapterEntry | None:
        name = self.names.find(adapter_id)
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
        """What `name` means for this caller. An adapter that does not exist for the caller is as unknown as any."""
        found = self._find(name, principal)
        if found is not None:
            return found
        near = {meant: self._beside(meant, principal) for meant in meanings(name, principal.tenant)}
        raise unknown_adapter(name, near, self.bases)

    def models(self, after: str | None = None, principal: Principal = OPERATOR) -> Iterator[AdapterEntry]:
        """All names of the caller, sorted; those after the name `after`."""
        if principal.is_admin:
            return self.adapters.after(after)
        parts = (self.seen[who].after(after) for who in (principal.tenant, PUBLIC) if who in self.seen)
        return merge(*parts, key=lambda entry: entry.name)

    def _beside(self, name: str, principal: Principal) -> list[str]:
        beside = self.adapters.around(name, NUM_COMPARED)
        return [near for near in beside if self.adapters[near].exists_for(principal)]

    def _find(self, name: str, principal: Principal) -> AdapterEntry | None:
        for stored in meanings(name, principal.tenant):
            entry = self.adapters.find(stored)
            if entry is not None and entry.exists_for(principal):
                return entry
        return None


def _seen(
    seen: Mapping[str, SortedMap[str, AdapterEntry]], before: Iterable[AdapterEntry], now: Iterable[AdapterEntry]
) -> Mapping[str, SortedMap[str, AdapterEntry]]:
    changes: dict[str, dict[str, AdapterEntry | None]] = {}
    for entry in before:
        for who in _seers(entry):
            changes.setdefault(who, {})[entry.name] = None
    for entry in now:
        for who in _seers(entry):
            changes.setdefault(who, {})[entry.name] = entry
    if not changes:
        return seen
    changed = {who: seen.get(who, SortedMap[str, AdapterEntry]()).changed(entries) for who, entries in changes.items()}
    return {who: names for who, names in {**seen, **changed}.items() if names}


def _seers(entry: AdapterEntry) -> Iterable[str]:
    """As `AdapterEntry.exists_for`, without administrators."""
    if entry.visibility == "public":
        return (PUBLIC,)
    return {entry.tenant, *entry.shared_with} if entry.visibility == "shared" else (entry.tenant,)


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
