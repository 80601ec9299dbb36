"""The keys' hashes on disk, for a server that starts while the database is away.

The file's time of modification says when they were last known to be current. Only its owner may read it.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from loray.catalog.snapshots.disk import name_of
from loray.errors import IntegrityError, SpecError
from loray.files import check_private, write_private
from loray.spec import ApiKey, HashedKey, KeyChanges, Tenant
from loray.telemetry import get_logger

_log = get_logger(__name__)

_FORMAT = 1
_MAX_BYTES = 1 << 30


class KeptKeys(NamedTuple):
    """All keys and tenants, which were current `age_s` seconds ago."""

    all: KeyChanges
    age_s: float


@dataclass(frozen=True, slots=True)
class KeysFile:
    """A file with the keys of the catalog at `catalog_url`."""

    path: Path
    catalog_url: str

    def write(self, state: KeyChanges) -> None:
        """Replaces the file. Where that is not possible, a warning says so."""
        content = {
            "format": _FORMAT,
            "catalog": name_of(self.catalog_url),
            "counter": state.counter,
            "any_keys": state.any_keys,
            "keys": [[found.sha256.hex(), found.key.model_dump(mode="json")] for found in state.keys],
            "tenants": [tenant.model_dump(mode="json") for tenant in state.tenants],
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_private(self.path, json.dumps(content))
        except OSError as e:
            _log.warning("the keys cannot be kept in %s: %s", self.path, e)

    def read(self) -> KeptKeys | None:
        """None where there is no file that can be used, with a warning that says why."""
        try:
            with self.path.open("rb") as f:
                age_s = max(0.0, time.time() - check_private(f, _MAX_BYTES))
                return KeptKeys(self._parse(json.load(f)), age_s)
        except FileNotFoundError:
            return None
        except (OSError, IntegrityError) as e:
            _log.warning("the keys in %s are not used: %s", self.path, e)
        except (AttributeError, KeyError, TypeError, ValueError, SpecError) as e:
            _log.warning("the keys in %s are not used, because the file is damaged: %r", self.path, e)
        return None

    def _parse(self, content: dict[str, Any]) -> KeyChanges:
        if content["format"] != _FORMAT:
            raise IntegrityError(f"another loray wrote it (format {content['format']}, this one reads {_FORMAT})")
        if content["catalog"] != name_of(self.catalog_url):
            raise IntegrityError("it is of another catalog")
        counter, any_keys, keys, tenants = (content[name] for name in ("counter", "any_keys", "keys", "tenants"))
        if not (isinstance(counter, int) and isinstance(any_keys, bool)):
            raise TypeError("counter or any_keys")
        hashed = tuple(HashedKey(bytes.fromhex(sha256), ApiKey.parse(key, source="key")) for sha256, key in keys)
        return KeyChanges(counter, hashed, tuple(Tenant.parse(t, source="tenant") for t in tenants), any_keys)
