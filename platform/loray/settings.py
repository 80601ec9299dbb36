"""Settings from the environment: `LORAY_*` variables, checked once, with errors that name the variable."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, urlsplit

from loray.errors import SettingsError
from loray.locations import S3Location, is_this_machine, parse_location
from loray.variables import (
    NONE,
    OFF,
    ON,
    hashes,
    log_target,
    names_of,
    one_of,
    origins,
    positive,
    share,
    size,
    whole,
    whole_or_none,
    worker_group,
)

if TYPE_CHECKING:  # importing it takes 0.1 s, and `loray --help` needs nothing of it
    from loray.spec import TrainingGroup

_NAMES = (
    "HOME URL STORE CATALOG ADDRESS LOG_LEVEL PEAK_TFLOPS GATE_TOLERANCE GATE_TRUSTS USAGE_DAYS ACCESS_LOG DATA "
    "MAX_JOBS MAX_WORKERS SCRATCH_BYTES SNAPSHOT_BYTES TRACES TRAINING_GROUP FRONT_GROUP API_KEY API_KEYS_SHA256 "
    "METRICS_KEYS_SHA256 KEY_MAX_AGE_S CORS_ORIGINS UNKNOWN_FIELDS FILES BATCH_FACTOR TINKER_NAMES"
)
_KNOWN = {f"LORAY_{name}" for name in _NAMES.split()}
# Kubernetes sets variables of these forms in every pod of a namespace that has a Service called loray-….
_SERVICE_VARIABLE = re.compile(r"_SERVICE_(HOST|PORT)(_|$)|_PORT(_|$)")
# `loray up --s3` writes this file. While it exists, the default store is the bucket of the local S3 server.
LOCAL_S3_FOLDER = "s3"
STORE_URL_FILE = "store_url"
DEFAULT_GATE_TOLERANCE = 0.10
DEFAULT_USAGE_DAYS = 400
DEFAULT_BATCH_FACTOR = 0.5
DEFAULT_SNAPSHOT_BYTES = 1 << 30
DEFAULT_MAX_JOBS, DEFAULT_MAX_WORKERS = 4, 16
DEFAULT_KEY_MAX_AGE_S = 3600.0
_SHORTEST_KEY = 32
_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@dataclass(frozen=True, slots=True)
class Settings:
    """Locations of the home folder, the store, the catalog and the cluster, and options.

    home     folder of everything that loray keeps on this machine (`LORAY_HOME`, default `~/.loray`)
    store    URL of the adapter store (`LORAY_STORE`; default: the server that `loray up --s3` started, else
             `file://HOME/store`)
    catalog  SQLAlchemy URL of the catalog (`LORAY_CATALOG`, default SQLite in HOME)
    address  Ray dashboard or job-server address (`LORAY_ADDRESS`, default None: a local cluster)
    peak_tflops  of a training worker's device, 10¹² FLOP/s, for MFU (`LORAY_PEAK_TFLOPS`, default None: measured)
    url      of a server (`LORAY_URL`): commands on adapters ask its API then, and need neither database nor store
    gate_tolerance  share by which a LongLoRA adapter's perplexity at the base's native context may exceed that of the
             base when it gets an alias (`LORAY_GATE_TOLERANCE`, default 0.1)
    gate_trusts_keys  whether that perplexity may be one which a client has reported (`LORAY_GATE_TRUSTS=keys`; default
             `jobs`: what loray has measured alone)
    usage_days  days after which what a request used is forgotten (`LORAY_USAGE_DAYS`, default 400; 0: never)
    access_log  absolute path of a file, or `-` for stdout, that gets a JSON line for each HTTP request
             (`LORAY_ACCESS_LOG`, default None)
    data     s3:// URL below which each tenant's training data lies, in a folder of the tenant's name (`LORAY_DATA`,
             default None: tenants submit no jobs through the API)
    max_jobs, max_workers  of a tenant at once, if neither it nor the key has a limit (`LORAY_MAX_JOBS`, `_WORKERS`,
             default 4 and 16; `none`: as many as it likes)
    scratch_bytes  of temporary files that a server holds at once (`LORAY_SCRATCH_BYTES`, for instance 20GiB; default
             None: 80 % of what is free at its start)
    snapshot_bytes  of all names in each gateway's memory, beyond which nobody publishes (`LORAY_SNAPSHOT_BYTES`,
             default 1 GiB)
    training_group  the group of the cluster's nodes that jobs run on (`LORAY_TRAINING_GROUP`, default None: anywhere)
    front_group  the group of the cluster's nodes that gateways run on (`LORAY_FRONT_GROUP`, default None: anywhere)
    api_key  the key that clients send (`LORAY_API_KEY`); a server started with it takes it as an administrator's
    key_hashes   SHA-256 of other administrator's keys of the deployment (`LORAY_API_KEYS_SHA256`, comma-separated)
    metrics_key_hashes  of keys that may read `/metrics` and `/status` alone (`LORAY_METRICS_KEYS_SHA256`)
    key_max_age_s  how long the catalog's keys go on while it cannot be read (`LORAY_KEY_MAX_AGE_S`, default an hour)
    files    whether gateways take files and batches (`LORAY_FILES`, default on; off: they do not have these routes)
    batch_factor  share of the tokens of batches that budgets count (`LORAY_BATCH_FACTOR`, default 0.5)
    origins  of sites whose pages may ask gateways that need keys (`LORAY_CORS_ORIGINS`, comma-separated, or `*`;
             default none)
    tinker_names  further names of bases in Tinker's protocol (`LORAY_TINKER_NAMES`, JSON: name → base; default none)
    refuses_unknown_fields  of requests to gateways (`LORAY_UNKNOWN_FIELDS=refuse`; default `ignore`: they are named in
             a header, but for likely typing errors)
    """

    home: Path
    store: str
    catalog: str
    address: str | None
    log_level: str
    peak_tflops: float | None = None
    gate_tolerance: float = DEFAULT_GATE_TOLERANCE
    gate_trusts_keys: bool = False
    usage_days: int = DEFAULT_USAGE_DAYS
    access_log: str | None = None
    data: str | None = None
    max_jobs: int | None = DEFAULT_MAX_JOBS
    max_workers: int | None = DEFAULT_MAX_WORKERS
    scratch_bytes: int | None = None
    snapshot_bytes: int = DEFAULT_SNAPSHOT_BYTES
    training_group: TrainingGroup | None = None
    front_group: str | None = None
    api_key: str | None = field(default=None, repr=False)
    key_hashes: tuple[str, ...] = ()
    metrics_key_hashes: tuple[str, ...] = ()
    key_max_age_s: float = DEFAULT_KEY_MAX_AGE_S
    origins: tuple[str, ...] = ()
    files: bool = True
    batch_factor: float = DEFAULT_BATCH_FACTOR
    tinker_names: Mapping[str, str] = field(default_factory=dict, hash=False)
    refuses_unknown_fields: bool = False
    url: str | None = None

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> Settings:
        env = os.environ if env is None else env
        ours = {k for k in env if k.startswith("LORAY_") and not _SERVICE_VARIABLE.search(k)}
        if unknown := ", ".join(sorted(ours - _KNOWN)):
            raise SettingsError(f"unknown environment variable {unknown}; known are {', '.join(sorted(_KNOWN))}")
        home = Path(env.get("LORAY_HOME") or "~/.loray").expanduser().absolute()
        url = env.get("LORAY_URL") or None
        if url is not None and not url.startswith(("http://", "https://")):
            raise SettingsError(f"LORAY_URL={url!r} must begin with http:// or https://, as http://127.0.0.1:8000")
        if home.exists() and not home.is_dir():
            raise SettingsError(f"LORAY_HOME={home} is not a folder; point it at one, or at a path that does not exist")
        store = env.get("LORAY_STORE") or _default_store(home)
        try:
            parse_location(store)
        except SettingsError as e:
            raise SettingsError(f"LORAY_STORE: {e}") from e
        catalog = env.get("LORAY_CATALOG") or f"sqlite:///{home}/catalog.db"
        if not catalog.startswith(("sqlite:", "postgresql")):
            scheme, separator, _ = catalog.partition("://")  # the rest may hold a password
            found = f"begins with {scheme}://" if separator else "has no scheme"
            raise SettingsError(f"LORAY_CATALOG {found}; it must be a sqlite:/// or postgresql:// URL")
        level = (env.get("LORAY_LOG_LEVEL") or "INFO").upper()
        if level not in _LOG_LEVELS:
            raise SettingsError(f"LORAY_LOG_LEVEL={level!r} must be one of {', '.join(_LOG_LEVELS)}")
        return cls(
            home=home,
            url=url,
            store=store,
            catalog=catalog,
            address=env.get("LORAY_ADDRESS") or None,
            log_level=level,
            peak_tflops=positive(env, "LORAY_PEAK_TFLOPS"),
            gate_tolerance=share(env, "LORAY_GATE_TOLERANCE", DEFAULT_GATE_TOLERANCE),
            gate_trusts_keys=one_of(env, "LORAY_GATE_TRUSTS", ("jobs", "keys")) == "keys",
            usage_days=DEFAULT_USAGE_DAYS if (days := whole(env, "LORAY_USAGE_DAYS")) is None else days,
            access_log=log_target(env.get("LORAY_ACCESS_LOG")),
            data=_data(env.get("LORAY_DATA"), store),
            max_jobs=whole_or_none(env, "LORAY_MAX_JOBS", DEFAULT_MAX_JOBS),
            max_workers=whole_or_none(env, "LORAY_MAX_WORKERS", DEFAULT_MAX_WORKERS),
            scratch_bytes=size(env, "LORAY_SCRATCH_BYTES"),
            snapshot_bytes=size(env, "LORAY_SNAPSHOT_BYTES") or DEFAULT_SNAPSHOT_BYTES,
            training_group=worker_group(env, "LORAY_TRAINING_GROUP"),
            front_group=(front := worker_group(env, "LORAY_FRONT_GROUP")) and front.name,
            api_key=env.get("LORAY_API_KEY") or None,
            key_hashes=hashes(env, "LORAY_API_KEYS_SHA256"),
            metrics_key_hashes=hashes(env, "LORAY_METRICS_KEYS_SHA256"),
            key_max_age_s=positive(env, "LORAY_KEY_MAX_AGE_S") or DEFAULT_KEY_MAX_AGE_S,
            origins=origins(env, "LORAY_CORS_ORIGINS"),
            files=one_of(env, "LORAY_FILES", (ON, OFF)) == ON,
            batch_factor=share(env, "LORAY_BATCH_FACTOR", DEFAULT_BATCH_FACTOR),
            tinker_names=names_of(env, "LORAY_TINKER_NAMES"),
            refuses_unknown_fields=one_of(env, "LORAY_UNKNOWN_FIELDS", ("ignore", "refuse")) == "refuse",
        )

    @property
    def is_local(self) -> bool:
        """A remote cluster cannot reach the store or the catalog."""
        return parse_location(self.store).is_local or _is_local_catalog(self.catalog)

    @property
    def is_remote(self) -> bool:
        """The cluster's `address` names another machine."""
        return self.address is not None and not is_this_machine(self.address)

    def check_reachable_from(self, address: str) -> None:
        """Raise SettingsError if the machines of the cluster at `address` cannot reach the store or the catalog."""
        if self.is_local:
            raise SettingsError(
                f"a cluster at {address} cannot reach this machine, which LORAY_STORE or LORAY_CATALOG point to: set "
                "LORAY_STORE to an s3:// URL and LORAY_CATALOG to a postgresql:// URL that both can reach, or use the "
                "local cluster (no LORAY_ADDRESS, no --address)"
            )

    def to_env(self, *, secrets: bool = True) -> dict[str, str]:
        """The variables that give another process the same settings, without `LORAY_ADDRESS`.

        `secrets=False` leaves out a LORAY_CATALOG with a password, for an environment that others can read.
        """
        env = {
            "LORAY_HOME": str(self.home),
            "LORAY_STORE": self.store,
            "LORAY_CATALOG": self.catalog,
            "LORAY_LOG_LEVEL": self.log_level,
        }
        optional = {
            "LORAY_PEAK_TFLOPS": self.peak_tflops,
            "LORAY_GATE_TOLERANCE": None if self.gate_tolerance == DEFAULT_GATE_TOLERANCE else self.gate_tolerance,
            "LORAY_GATE_TRUSTS": "keys" if self.gate_trusts_keys else None,
            "LORAY_USAGE_DAYS": None if self.usage_days == DEFAULT_USAGE_DAYS else self.usage_days,
            "LORAY_ACCESS_LOG": self.access_log,
            "LORAY_DATA": self.data,
            "LORAY_SCRATCH_BYTES": self.scratch_bytes,
            "LORAY_SNAPSHOT_BYTES": None if self.snapshot_bytes == DEFAULT_SNAPSHOT_BYTES else self.snapshot_bytes,
            "LORAY_TRAINING_GROUP": self.training_group and self.training_group.name,
            "LORAY_FRONT_GROUP": self.front_group,
            "LORAY_FILES": None if self.files else OFF,
            "LORAY_BATCH_FACTOR": None if self.batch_factor == DEFAULT_BATCH_FACTOR else self.batch_factor,
        }
        env |= {name: str(value) for name, value in optional.items() if value is not None}
        for name, most, default in (
            ("LORAY_MAX_JOBS", self.max_jobs, DEFAULT_MAX_JOBS),
            ("LORAY_MAX_WORKERS", self.max_workers, DEFAULT_MAX_WORKERS),
        ):
            if most != default:
                env[name] = NONE if most is None else str(most)
        if self.catalog_has_password and not secrets:
            del env["LORAY_CATALOG"]
        return env

    @property
    def static_key_hashes(self) -> tuple[str, ...]:
        """SHA-256 of the deployment's own keys. Raises SettingsError if LORAY_API_KEY could be guessed from its own."""
        if self.api_key is None:
            return self.key_hashes
        if len(self.api_key) < _SHORTEST_KEY:
            raise SettingsError(
                f"LORAY_API_KEY has {len(self.api_key)} characters, and a server's key needs {_SHORTEST_KEY} at least; "
                "`loray keys create --static` makes one"
            )
        return (hashlib.sha256(self.api_key.encode()).hexdigest(), *self.key_hashes)

    def to_serving_env(self) -> dict[str, str]:
        """The variables that servers of this deployment alone are given: of its own keys the hashes, never the keys."""
        env = {
            "LORAY_API_KEYS_SHA256": ",".join(self.static_key_hashes),
            "LORAY_METRICS_KEYS_SHA256": ",".join(self.metrics_key_hashes),
            "LORAY_KEY_MAX_AGE_S": "" if self.key_max_age_s == DEFAULT_KEY_MAX_AGE_S else str(self.key_max_age_s),
            "LORAY_CORS_ORIGINS": ",".join(self.origins),
            "LORAY_UNKNOWN_FIELDS": "refuse" if self.refuses_unknown_fields else "",
            "LORAY_TINKER_NAMES": json.dumps(dict(self.tinker_names), sort_keys=True) if self.tinker_names else "",
        }
        return {name: value for name, value in env.items() if value}

    def to_remote_env(self) -> dict[str, str]:
        """The variables for the nodes of another cluster: without secrets and without paths of this machine."""
        location = parse_location(self.store)
        if isinstance(location, S3Location):
            location = replace(location, credentials_file=None)
        env = self.to_env(secrets=False) | {"LORAY_STORE": location.url}
        del env["LORAY_HOME"]
        for name in ("LORAY_DATA", "LORAY_ACCESS_LOG", "LORAY_SCRATCH_BYTES"):  # of servers
            env.pop(name, None)
        return env

    @property
    def catalog_has_password(self) -> bool:
        parts = urlsplit(self.catalog)
        return parts.password is not None or any("password" in name.lower() for name, _ in parse_qsl(parts.query))


def _data(url: str | None, store: str) -> str | None:
    if not url:
        return None
    try:
        data, adapters = parse_location(url), parse_location(store)
    except SettingsError as e:
        raise SettingsError(f"LORAY_DATA: {e}") from e
    if not isinstance(data, S3Location):
        raise SettingsError("LORAY_DATA must be an s3:// URL")
    if isinstance(adapters, S3Location) and data.bucket == adapters.bucket:
        inner, outer = sorted((f"{data.prefix}/".lstrip("/"), f"{adapters.prefix}/".lstrip("/")), key=len, reverse=True)
        if inner.startswith(outer):
            raise SettingsError("LORAY_DATA and LORAY_STORE must not overlap: training data would lie among adapters")
    return url


def _is_local_catalog(url: str) -> bool:
    """The URL is of SQLite, or of PostgreSQL on loopback or behind a socket, as a URL without a host means."""
    parts = urlsplit(url)
    named = [value for name, value in parse_qsl(parts.query) if name in ("host", "hostaddr")]
    hosts = [host for host in (parts.hostname, *",".join(named).split(",")) if host]
    return url.startswith("sqlite:") or all(host.startswith("/") or is_this_machine(host) for host in hosts)


def _default_store(home: Path) -> str:
    file = home / LOCAL_S3_FOLDER / STORE_URL_FILE
    return file.read_text(encoding="utf-8").strip() if file.is_file() else f"file://{home}/store"
