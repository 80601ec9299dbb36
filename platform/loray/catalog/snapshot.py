"""Snapshots: all names in memory, and what has changed since one was taken."""

from __future__ import annotations

import json
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import merge
from typing import Any, Generic, NamedTuple, TypeVar

import sqlalchemy as sa

from loray.catalog.database import Database
from loray.catalog.entries import NUM_COMPARED, AdapterEntry, split_model, unknown_adapter
from loray.catalog.queries import load_entries, read_counter
from loray.catalog.schema import adapters, bases, versions
from loray.spec import OPERATOR, AdapterRef, Principal, meanings

# -- sorted maps ------------------------------------------------------------------------------------------------------

K = TypeVar("K", int, str)
V = TypeVar("V")

_FULL = 512  # keys of a block; a larger one is split


class _Block(NamedTuple, Generic[K, V]):
    """Keys in order, and their values."""

    keys: tuple[K, ...]
    values: tuple[V, ...]


class SortedMap(Mapping[K, V]):
    """A mapping sorted by keys that never changes: `changed` returns another one.

    A change of one key copies its block and the list of blocks: microseconds at a hundred thousand keys, where a copy
    of a dictionary and of a sorted list of its keys would take milliseconds each.
    """

    __slots__ = ("_blocks", "_firsts", "_len")

    def __init__(self, items: Iterable[tuple[K, V]] = ()) -> None:
        """`items`: of different keys, in any order."""
        self._set(_blocks_of(sorted(items, key=lambda item: item[0])))

    def __getitem__(self, key: K) -> V:
        found = self.find(key)
        if found is None:
            raise KeyError(key)
        return found

    def __contains__(self, key: object) -> bool:
        return self.find(key) is not None  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[K]:
        return (key for block in self._blocks for key in block.keys)

    def __len__(self) -> int:
        return self._len

    def find(self, key: K) -> V | None:
        """The key's value; None where it is not here. Values are never None."""
        i = bisect_right(self._firsts, key) - 1
        if i < 0:
            return None
        keys, values = self._blocks[i]
        at = bisect_left(keys, key)
        return values[at] if at < len(keys) and keys[at] == key else None

    def after(self, key: K | None) -> Iterator[V]:
        """The values of the keys after `key` in order; None: all."""
        if key is None:
            start, at = 0, 0
        else:
            start = max(0, bisect_right(self._firsts, key) - 1)
            at = bisect_right(self._blocks[start].keys, key) if self._blocks else 0
        for i in range(start, len(self._blocks)):
            yield from self._blocks[i].values[at:]
            at = 0

    def around(self, key: K, count: int) -> Sequence[K]:
        """At most `count` keys in a row, those beside the place of `key` in the order."""
        if not self._blocks:
            return ()
        first = last = max(0, bisect_right(self._firsts, key) - 1)
        keys: tuple[K, ...] = self._blocks[first].keys
        while first > 0 and bisect_left(keys, key) < count:
            first -= 1
            keys = self._blocks[first].keys + keys
        while last + 1 < len(self._blocks) and len(keys) - bisect_left(keys, key) < count:
            last += 1
            keys += self._blocks[last].keys
        start = min(max(0, bisect_left(keys, key) - count // 2), max(0, len(keys) - count))
        return keys[start : start + count]

    def changed(self, changes: Mapping[K, V | None]) -> SortedMap[K, V]:
        """A copy with these values; a key of None is left out."""
        if not changes:
            return self
        by_block: dict[int, dict[K, V | None]] = {}
        for key, value in changes.items():
            by_block.setdefault(max(0, bisect_right(self._firsts, key) - 1), {})[key] = value
        blocks = list(self._blocks)
        for i in sorted(by_block, reverse=True):
            before: dict[K, V | None] = dict(zip(*blocks[i], strict=True)) if blocks else {}
            merged = before | by_block[i]
            kept = sorted(((k, v) for k, v in merged.items() if v is not None), key=lambda item: item[0])
            blocks[i : i + 1] = _blocks_of(kept)
        copy: SortedMap[K, V] = SortedMap.__new__(SortedMap)
        copy._set(blocks)
        return copy

    def _set(self, blocks: Sequence[_Block[K, V]]) -> None:
        self._blocks: tuple[_Block[K, V], ...] = tuple(blocks)
        self._firsts: tuple[Any, ...] = tuple(block.keys[0] for block in blocks)
        self._len = sum(len(block.keys) for block in blocks)


def _blocks_of(items: Sequence[tuple[K, V]]) -> list[_Block[K, V]]:
    """Blocks of half the size, so that they have room, of a block that became too large or of a whole map."""
    size = len(items) if len(items) <= _FULL else _FULL // 2
    parts = (items[i : i + size] for i in range(0, len(items), size or 1))
    return [_Block(tuple(k for k, _ in part), tuple(v for _, v in part)) for part in parts]


# -- snapshots --------------------------------------------------------------------------------------------------------

PUBLIC = ""  # in place of a tenant's name


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
        """The adapter that `name` means for this caller. Raises AdapterNotFound, also for one that others alone see."""
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
    """The tenants for which the name exists by `AdapterEntry.exists_for`, beside administrators."""
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


# -- what changed since -----------------------------------------------------------------------------------------------

_LAST_ID = 2**31 - 1  # what the column holds
_PAGE = 500  # adapters that are read at once: drivers hold Python's lock while they make the rows of a result


def load_snapshot(db: Database, before: CatalogSnapshot | None = None, *, whole: bool = False) -> CatalogSnapshot:
    """`Catalog.snapshot`."""
    before = before or CatalogSnapshot()
    with db.reading() as c:
        whole = whole or read_counter(c) < before.counter
        return before.after(changes_since(c, db.principal, before, whole=whole))


def changes_since(c: sa.Connection, principal: Principal, before: CatalogSnapshot, *, whole: bool = False) -> Changes:
    """The changes for the caller since the snapshot was taken; all its names where that is empty.

    A row of `adapters` is deleted only long after it was marked as deleted, so no name leaves unseen. `whole` compares
    everything, also with a snapshot of another copy of the catalog.
    """
    found: dict[int, AdapterEntry | None] = dict.fromkeys(before.names) if whole else {}
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
