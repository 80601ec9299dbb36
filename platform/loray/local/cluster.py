"""A Ray cluster on this machine, owned by one LORAY_HOME: started, found and stopped without importing Ray.

The dashboard listens on 127.0.0.1 only. Ray's internal servers listen on every interface whatever one asks for, so
all of them want a token, which only this user can read. `ray stop` is never used: it would stop the user's other
clusters too.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from loray.errors import ClusterError
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
from loray.settings import Settings
from loray.telemetry import get_logger

log = get_logger(__name__)

OBJECT_STORE_BYTES = 200 << 20

_STATE_FILE = "cluster.json"
_TOKEN_FILE = "ray-token"
_PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "metrics-export-port", "ray-client-server-port")
_LOCK_FILE = "cluster.lock"
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_JOB_STOP_WAIT_TIME_S": "30",  # a driver writes down how it ended; Ray would kill it after 3 s
}
# Sockets lie below this folder, and a socket's path has at most 107 bytes: a long TMPDIR would not do.
_TEMP_ROOT = Path("/tmp")


@dataclass(frozen=True, slots=True)
class LocalCluster(Server):
    """`address` is the dashboard's and job server's URL, `gcs_address` what ray.init takes."""

    address: str
    gcs_address: str
    temp_dir: str
    token_file: str
    log_file: str

    @property
    def client_env(self) -> dict[str, str]:
        """What a process needs in its environment, before it imports Ray, to talk to this cluster."""
        return {"RAY_ADDRESS": self.gcs_address, **_auth_env(Path(self.token_file))}


def ensure_started(settings: Settings) -> LocalCluster:
    """The cluster of this home, started where it does not run; `client_env` is set in this process."""
    cluster = current_cluster(settings.home) or start_local_cluster(settings.home)
    os.environ.update(cluster.client_env)
    return cluster


def start_local_cluster(
    home: Path,
    *,
    num_cpus: int | None = None,
    object_store_bytes: int = OBJECT_STORE_BYTES,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 90.0,
) -> LocalCluster:
    """Start a head node and wait until it takes jobs; the running one is returned where there is one.

    `num_cpus` None: as many as the machine has. `env` is added to the environment of all its processes.
    ClusterError shows the log's end where Ray does not come up.
    """
    home.mkdir(parents=True, exist_ok=True)
    with exclusive(home / _LOCK_FILE):
        running = current_cluster(home)
        if running is not None:
            return running
        _stop(home)  # what is left of one that died
        ports = free_ports(len(_PORTS))
        token_file = _token_file(home)
        temp_dir = Path(tempfile.mkdtemp(prefix="loray-", dir=_TEMP_ROOT))
        log_file = home / "logs" / "cluster.log"
        log_file.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += [f"--node-ip-address={LOOPBACK}", f"--dashboard-host={LOOPBACK}", "--include-dashboard=true"]
        command += [f"--temp-dir={temp_dir}", f"--object-store-memory={object_store_bytes}", "--log-color=false"]
        command += [f"--{name}={port}" for name, port in zip(_PORTS, ports, strict=True)]
        if num_cpus is not None:
            command.append(f"--num-cpus={num_cpus}")
        inherited = {k: v for k, v in os.environ.items() if k not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
        # Jobs say `python`: this one, which has loray.
        inherited["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", os.defpath)])
        process = spawn(
            command,
            log_file=log_file,
            cwd=home,
            env=inherited | _ENVIRONMENT | _auth_env(token_file) | dict(env or {}),
        )
        cluster = LocalCluster(
            **identity(process),
            address=f"http://{LOOPBACK}:{ports[1]}",
            gcs_address=f"{LOOPBACK}:{ports[0]}",
            temp_dir=str(temp_dir),
            token_file=str(token_file),
            log_file=str(log_file),
        )
        try:
            _wait_until_ready(process, cluster, timeout_s)
            write_state(home / _STATE_FILE, cluster)
            leave_running(process)
        except BaseException:
            _terminate(cluster)
            raise
        log.debug("Ray runs at %s as process %d", cluster.address, cluster.pid)
        return cluster


def current_cluster(home: Path) -> LocalCluster | None:
    """The cluster that this home started, None where it has none or it has died."""
    cluster = _read_state(home)
    return cluster if cluster is not None and cluster.is_alive else None


def stop_local_cluster(home: Path) -> bool:
    """Stop this home's cluster and all its processes; False where none was running."""
    if not home.is_dir():
        return False
    with exclusive(home / _LOCK_FILE):
        return _stop(home)


def _stop(home: Path) -> bool:
    """Whether it ran; clears away what is left of one that died, too."""
    cluster = _read_state(home)
    alive = cluster is not None and cluster.is_alive
    if cluster is not None:
        _terminate(cluster)
    (home / _STATE_FILE).unlink(missing_ok=True)
    return alive


def _wait_until_ready(process: subprocess.Popen[bytes], cluster: LocalCluster, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    token = Path(cluster.token_file).read_text(encoding="utf-8")
    request = urllib.request.Request(f"{cluster.address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ClusterError(f"Ray ended with code {process.returncode} while it started{log_tail(cluster.log_file)}")
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                if response.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            pass  # not listening yet
        time.sleep(0.1)
    raise ClusterError(f"Ray did not come up within {timeout_s:.0f} s{log_tail(cluster.log_file)}")


def _terminate(cluster: LocalCluster) -> None:
    cluster.end()
    shutil.rmtree(cluster.temp_dir, ignore_errors=True)


def _auth_env(token_file: Path) -> dict[str, str]:
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}


def _token_file(home: Path) -> Path:
    path = home / _TOKEN_FILE
    if not path.is_file():
        write_private(path, secrets.token_hex(32))
    return path


def _read_state(home: Path) -> LocalCluster | None:
    cluster = read_state(home / _STATE_FILE, LocalCluster)
    # The folder will be removed: only one that start_local_cluster has made.
    return cluster if cluster is not None and Path(cluster.temp_dir).parent == _TEMP_ROOT else None
