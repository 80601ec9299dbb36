"""The last snapshot on disk, for a server that starts while the database is away.

A file of JSON lines: a header, blocks of adapters, and a last line with the SHA-256 of all before it. Its time of
modification says when it was last known to be current. Only its owner may read it: it has the names of all tenants.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from loray.catalog.database import shown_url
from loray.catalog.entries import AdapterEntry, make_pointers, make_ref
from loray.catalog.snapshots.snapshot import CatalogSnapshot, Changes
from loray.errors import IntegrityError
from loray.files import check_private, replacing_private
from loray.telemetry import get_logger

_log = get_logger(__name__)

_FORMAT = 1
_BLOCK = 200  # adapters of a line: encoding one holds Python's lock
_MAX_BYTES = 2 << 30
_MAX_LINE = 64 << 20
_MAX_AGE_S = 7 * 24 * 3600.0


class Kept(NamedTuple):
    """A snapshot from disk, which was current `age_s` seconds ago."""

    snapshot: CatalogSnapshot
    age_s: float


@dataclass(frozen=True, slots=True)
class SnapshotFile:
    """A file with a snapshot of the catalog at `catalog_url`."""

    path: Path
    catalog_url: str

    def write(self, snapshot: CatalogSnapshot) -> bool:
        """Replaces the file; False, with a warning, where that is not possible."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing_private(self.path) as f:
                _write(f, self._header(snapshot), snapshot)
        except OSError as e:
            _log.warning("the catalog's snapshot cannot be kept in %s: %s", self.path, e)
            return False
        return True

    def read(self) -> Kept | None:
        """The snapshot; None where there is none that can be used, with a warning that says why."""
        try:
            with self.path.open("rb") as f:
                return self._read(f, time.time() - check_private(f, _MAX_BYTES))
        except FileNotFoundError:
            return None
        except (OSError, IntegrityError) as e:
            _log.warning("the catalog's snapshot in %s is not used: %s", self.path, e)
            return None

    def _read(self, f: BinaryIO, age_s: float) -> Kept:
        lines = _checked_lines(f)
        try:
            header = next(lines)
            if header.get("format") != _FORMAT:
                raise IntegrityError(
                    f"another loray wrote it (format {header.get('format')}, this one reads {_FORMAT})"
                )
            if header["catalog"] != name_of(self.catalog_url):
                raise IntegrityError("it is of another catalog")
            if age_s > _MAX_AGE_S:
                raise IntegrityError(f"it is {age_s / 3600:.0f} h old")
            adapters = {i: _entry(fields) for block in lines for i, *fields in block["adapters"]}
        except (AttributeError, KeyError, TypeError, ValueError, StopIteration) as e:
            raise IntegrityError(f"it is damaged: {e!r}") from e
        changes = Changes(header["counter"], header["bases"], adapters, header["templates"])
        return Kept(CatalogSnapshot().after(changes), max(0.0, age_s))

    def _header(self, snapshot: CatalogSnapshot) -> dict[str, Any]:
        return {
            "format": _FORMAT,
            "catalog": name_of(self.catalog_url),
            "counter": snapshot.counter,
            "bases": snapshot.bases,
            "templates": snapshot.templates,
        }


def name_of(catalog_url: str) -> str:
    """Names a catalog without telling its address or password."""
    return hashlib.sha256(shown_url(catalog_url).encode()).hexdigest()


def _write(f: BinaryIO, header: dict[str, Any], snapshot: CatalogSnapshot) -> None:
    digest = hashlib.sha256()
    for line in _lines(header, snapshot):
        data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
        digest.update(data)
        f.write(data)
    f.write(json.dumps({"sha256": digest.hexdigest()}).encode() + b"\n")


def _lines(header: dict[str, Any], snapshot: CatalogSnapshot) -> Iterator[dict[str, Any]]:
    yield header
    rows = (_fields(adapter_id, snapshot.adapters[name]) for adapter_id, name in snapshot.names.items())
    while block := list(islice(rows, _BLOCK)):
        yield {"adapters": block}


def _checked_lines(f: BinaryIO) -> Iterator[dict[str, Any]]:
    """The lines but the last. Raises IntegrityError at the end where the last one does not confirm them."""
    digest = hashlib.sha256()
    while line := f.readline(_MAX_LINE):
        content = json.loads(line)
        if "sha256" in content:
            if content["sha256"] != digest.hexdigest() or f.read(1):
                raise IntegrityError("it is damaged: its bytes differ from its SHA-256")
            return
        digest.update(line)
        yield content
    raise IntegrityError("it is damaged: its end is missing")


def _fields(adapter_id: int, entry: AdapterEntry) -> list[Any]:
    refs = [
        [r.version, r.digest, r.context_length, r.nbytes, r.method, r.base_fingerprint, r.tool_parser, r.chat_template]
        for r in entry.refs
    ]
    who = [entry.tenant, entry.visibility, sorted(entry.shared_with)]
    return [adapter_id, entry.name, entry.created_at.isoformat(), refs, entry.pointers, *who]


def _entry(fields: list[Any]) -> AdapterEntry:
    name, created_at, refs, pointers, tenant, visibility, shared_with = fields
    return AdapterEntry(
        name=name,
        created_at=datetime.fromisoformat(created_at),
        refs=tuple(make_ref(name, *ref) for ref in refs),
        pointers=make_pointers((alias, version) for alias, version in pointers),
        tenant=sys.intern(tenant),
        visibility=visibility,
        shared_with=frozenset(sys.intern(tenant) for tenant in shared_with),
    )
