"""What the environment says: `LORAY_*` variables, checked once, with errors that name the variable."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loray.errors import SettingsError

_KNOWN = {"LORAY_HOME", "LORAY_STORE", "LORAY_CATALOG", "LORAY_ADDRESS", "LORAY_LOG_LEVEL"}
# Kubernetes describes a Service called loray-… to every pod of its namespace, in variables of these forms.
_SERVICE_VARIABLE = re.compile(r"_SERVICE_(HOST|PORT)(_|$)|_PORT(_|$)")
_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@dataclass(frozen=True, slots=True)
class Settings:
    """Where a machine keeps what, and where its store and catalog are.

    home     folder of everything that loray keeps on this machine (`LORAY_HOME`, default `~/.loray`)
    store    URL of the adapter store (`LORAY_STORE`, default `file://HOME/store`)
    catalog  SQLAlchemy URL of the catalog (`LORAY_CATALOG`, default SQLite in HOME)
    address  Ray dashboard or job-server address (`LORAY_ADDRESS`, default None: a local cluster)
    """

    home: Path
    store: str
    catalog: str
    address: str | None
    log_level: str

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        env = os.environ if env is None else env
        ours = {k for k in env if k.startswith("LORAY_") and not _SERVICE_VARIABLE.search(k)}
        unknown = sorted(ours - _KNOWN)
        if unknown:
            known = ", ".join(sorted(_KNOWN))
            raise SettingsError(f"unknown environment variable {', '.join(unknown)}; known are {known}")
        home = Path(env.get("LORAY_HOME") or "~/.loray").expanduser().absolute()
        if home.exists() and not home.is_dir():
            raise SettingsError(f"LORAY_HOME={home} is not a folder; point it at one, or at a path that does not exist")
        store = env.get("LORAY_STORE") or f"file://{home}/store"
        if not store.startswith(("file://", "s3://")):
            raise SettingsError(f"LORAY_STORE={store!r} must start with file:// or s3://")
        catalog = env.get("LORAY_CATALOG") or f"sqlite:///{home}/catalog.db"
        if not catalog.startswith(("sqlite:", "postgresql")):
            raise SettingsError(f"LORAY_CATALOG={catalog!r} must be a sqlite: or postgresql URL")
        level = (env.get("LORAY_LOG_LEVEL") or "INFO").upper()
        if level not in _LOG_LEVELS:
            raise SettingsError(f"LORAY_LOG_LEVEL={level!r} must be one of {', '.join(_LOG_LEVELS)}")
        return cls(home=home, store=store, catalog=catalog, address=env.get("LORAY_ADDRESS") or None, log_level=level)

    @property
    def is_local(self) -> bool:
        """True where store or catalog lie on this machine's disk, out of a remote cluster's reach."""
        return self.store.startswith("file://") or self.catalog.startswith("sqlite:")

    def to_env(self) -> dict[str, str]:
        """The variables that give another process the same settings (`LORAY_ADDRESS` is the caller's own)."""
        return {
            "LORAY_HOME": str(self.home),
            "LORAY_STORE": self.store,
            "LORAY_CATALOG": self.catalog,
            "LORAY_LOG_LEVEL": self.log_level,
        }
