"""The last snapshot and the keys of the catalog on disk, for a server that starts while the database is away.

Each is a file of JSON lines: a header, blocks of items, and a last line with the SHA-256 of all before it. Its time of
modification says when it was last known to be current. Only its owner may read it: it speaks of all tenants.
"""

from __future__ import annotations

import hashlib
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, Generic, NamedTuple, TypeVar

from loray.catalog.database import shown_url
from loray.catalog.entries import AdapterEntry, Canary, make_pointers, make_ref
from loray.catalog.queries import REF
from loray.catalog.snapshot import CatalogSnapshot, Changes
from loray.errors import IntegrityError, SpecError
from loray.files import check_private, read_json_lines, replacing_private, write_json_lines
from loray.spec import ApiKey, HashedKey, KeyChanges, Tenant
from loray.telemetry import get_logger

_log = get_logger(__name__)

T = TypeVar("T")

_FORMAT = 4
_BLOCK = 200  # items of a line: encoding one holds Python's lock
_MAX_BYTES = 2 << 30


class StoredSnapshot(NamedTuple, Generic[T]):
    """The content of a file, which was current `age_s` seconds ago."""

    state: T
    age_s: float


@dataclass(frozen=True)
class SnapshotStore(ABC, Generic[T]):
    """A file with something of the catalog at `catalog_url`: a subclass says what, and how it is JSON.

    WHAT       its name in warnings
    MAX_AGE_S  after which it is not used
    """

    path: Path
    catalog_url: str

    WHAT: ClassVar[str]
    MAX_AGE_S: ClassVar[float] = float("inf")

    @abstractmethod
    def _header(self, state: T) -> dict[str, Any]:
        """Fields that the file has once."""

    @abstractmethod
    def _items(self, state: T) -> Iterator[list[Any]]:
        """Lists of fields, of which there may be many."""

    @abstractmethod
    def _state(self, header: dict[str, Any], items: Iterable[list[Any]]) -> T:
        """The state of which the two others gave these. Raises KeyError, TypeError, ValueError or SpecError where they
        are damaged.
        """

    def write(self, state: T) -> bool:
        """Replace the file; False, with a warning, where that is not possible."""
        header = {"format": _FORMAT, "catalog": _name_of(self.catalog_url)} | self._header(state)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing_private(self.path) as f:
                write_json_lines(f, _lines(header, self._items(state)))
        except OSError as e:
            _log.warning("the catalog's %s cannot be kept in %s: %s", self.WHAT, self.path, e)
            return False
        return True

    def read(self) -> StoredSnapshot[T] | None:
        """The content of the file; None where nothing can be used, with a warning that says why."""
        try:
            with self.path.open("rb") as f:
                return self._read(f, max(0.0, time.time() - check_private(f, _MAX_BYTES)))
        except FileNotFoundError:
            return None
        except (OSError, IntegrityError) as e:
            _log.warning("the catalog's %s in %s are not used: %s", self.WHAT, self.path, e)
            return None

    def _read(self, f: BinaryIO, age_s: float) -> StoredSnapshot[T]:
        lines = read_json_lines(f)
        try:
            header = next(lines)
            if header.get("format") != _FORMAT:
                raise IntegrityError(
                    f"another loray wrote it (format {header.get('format')}, this one reads {_FORMAT})"
                )
            if header["catalog"] != _name_of(self.catalog_url):
                raise IntegrityError("it is of another catalog")
            if age_s > self.MAX_AGE_S:
                raise IntegrityError(f"it is {age_s / 3600:.0f} h old")
            return StoredSnapshot(self._state(header, (item for block in lines for item in block["items"])), age_s)
        except (AttributeError, KeyError, TypeError, ValueError, SpecError, StopIteration) as e:
            raise IntegrityError(f"it is damaged: {e!r}") from e


def _name_of(catalog_url: str) -> str:
    """Names a catalog without telling its address or password."""
    return hashlib.sha256(shown_url(catalog_url).encode()).hexdigest()


def _lines(header: dict[str, Any], items: Iterator[list[Any]]) -> Iterator[dict[str, Any]]:
    yield header
    while block := list(islice(items, _BLOCK)):
        yield {"items": block}


class SnapshotFile(SnapshotStore[CatalogSnapshot]):
    """A file with a snapshot of the catalog."""

    WHAT = "names"
    MAX_AGE_S = 7 * 24 * 3600.0

    def _header(self, state: CatalogSnapshot) -> dict[str, Any]:
        return {"counter": state.counter, "bases": state.bases, "templates": state.templates}

    def _items(self, state: CatalogSnapshot) -> Iterator[list[Any]]:
        return (_fields(adapter_id, state.adapters[name]) for adapter_id, name in state.ids.items())

    def _state(self, header: dict[str, Any], items: Iterable[list[Any]]) -> CatalogSnapshot:
        adapters = {adapter_id: _entry(fields) for adapter_id, *fields in items}
        return CatalogSnapshot().after(Changes(header["counter"], header["bases"], adapters, header["templates"]))


def _fields(adapter_id: int, entry: AdapterEntry) -> list[Any]:
    refs = [[*(getattr(r, field) for field in REF), r.invocation_tokens] for r in entry.refs]
    who = [entry.tenant, entry.visibility, sorted(entry.shared_with)]
    return [adapter_id, entry.name, entry.created_at.isoformat(), refs, entry.pointers, *who, entry.canaries]


def _entry(fields: list[Any]) -> AdapterEntry:
    name, created_at, refs, pointers, tenant, visibility, shared_with, canaries = fields
    return AdapterEntry(
        name=name,
        created_at=datetime.fromisoformat(created_at),
        refs=tuple(make_ref(name, *ref, invoked_by=invoked_by) for *ref, invoked_by in refs),
        pointers=make_pointers((alias, version) for alias, version in pointers),
        tenant=sys.intern(tenant),
        visibility=visibility,
        shared_with=frozenset(sys.intern(tenant) for tenant in shared_with),
        canaries=tuple(Canary(*canary) for canary in canaries),
    )


class KeysFile(SnapshotStore[KeyChanges]):
    """A file with all keys and tenants of the catalog. How old they may be, `KeyRing.max_age_s` says."""

    WHAT = "keys"

    def _header(self, state: KeyChanges) -> dict[str, Any]:
        return {"counter": state.counter, "any_keys": state.any_keys}

    def _items(self, state: KeyChanges) -> Iterator[list[Any]]:
        yield from (["tenant", tenant.model_dump(mode="json")] for tenant in state.tenants)
        yield from (["key", found.key.model_dump(mode="json"), found.sha256.hex()] for found in state.keys)

    def _state(self, header: dict[str, Any], items: Iterable[list[Any]]) -> KeyChanges:
        counter, any_keys = header["counter"], header["any_keys"]
        if not (isinstance(counter, int) and isinstance(any_keys, bool)):
            raise TypeError("counter or any_keys")
        keys, tenants = [], []
        for kind, fields, *sha256 in items:
            if kind == "tenant":
                tenants.append(Tenant.parse(fields, source="tenant"))
            else:
                keys.append(HashedKey(bytes.fromhex(*sha256), ApiKey.parse(fields, source="key")))
        return KeyChanges(counter, tuple(keys), tuple(tenants), any_keys)
