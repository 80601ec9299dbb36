"""The last snapshot on disk: the names of a gateway that starts while the database is away."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import Any

from loray.catalog.entries import AdapterEntry, Canary, make_pointers, make_ref
from loray.catalog.snapshots.kept import KeptFile
from loray.catalog.snapshots.snapshot import CatalogSnapshot, Changes


class SnapshotFile(KeptFile[CatalogSnapshot]):
    """A file with a snapshot of the catalog."""

    WHAT = "names"
    MAX_AGE_S = 7 * 24 * 3600.0

    def _header(self, state: CatalogSnapshot) -> dict[str, Any]:
        return {"counter": state.counter, "bases": state.bases, "templates": state.templates}

    def _items(self, state: CatalogSnapshot) -> Iterator[list[Any]]:
        return (_fields(adapter_id, state.adapters[name]) for adapter_id, name in state.names.items())

    def _state(self, header: dict[str, Any], items: Iterable[list[Any]]) -> CatalogSnapshot:
        adapters = {adapter_id: _entry(fields) for adapter_id, *fields in items}
        return CatalogSnapshot().after(Changes(header["counter"], header["bases"], adapters, header["templates"]))


def _fields(adapter_id: int, entry: AdapterEntry) -> list[Any]:
    refs = [
        [r.version, r.digest, r.context_length, r.nbytes, r.method, r.base_fingerprint, r.tool_parser, r.chat_template]
        for r in entry.refs
    ]
    who = [entry.tenant, entry.visibility, sorted(entry.shared_with)]
    return [adapter_id, entry.name, entry.created_at.isoformat(), refs, entry.pointers, *who, entry.canaries]


def _entry(fields: list[Any]) -> AdapterEntry:
    name, created_at, refs, pointers, tenant, visibility, shared_with, canaries = fields
    return AdapterEntry(
        name=name,
        created_at=datetime.fromisoformat(created_at),
        refs=tuple(make_ref(name, *ref) for ref in refs),
        pointers=make_pointers((alias, version) for alias, version in pointers),
        tenant=sys.intern(tenant),
        visibility=visibility,
        shared_with=frozenset(sys.intern(tenant) for tenant in shared_with),
        canaries=tuple(Canary(*canary) for canary in canaries),
    )
