"""The keys' hashes on disk, for a server that starts while the database is away."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from loray.catalog.snapshots.kept import KeptFile
from loray.spec import ApiKey, HashedKey, KeyChanges, Tenant


class KeysFile(KeptFile[KeyChanges]):
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
