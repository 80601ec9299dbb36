"""Who uses the processor while a server works: its processes by what they do."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

from benchmarks.processes import cpu_seconds, title, tree, with_variable
from loray.spec import engine_of
from serve_apps.deployment import APPLICATION, GATEWAY

# Parts of the titles of Ray's processes, the first that is found.
_ROLES = (
    (f"ServeReplica:{APPLICATION}:{GATEWAY}", "gateway"),
    (f"ServeReplica:{APPLICATION}:{engine_of('')}", "engine"),
    ("ServeReplica", "catalog"),
    ("ProxyActor", "proxy"),
    ("haproxy", "proxy"),
    ("ServeController", "controller"),
)
_SETTLE_S, _IDLE_S = 5.0, 10.0

CpuSeconds = Callable[[], Mapping[str, float]]


def of_tree(name: str, pid: int) -> CpuSeconds:
    """Of a process and its descendants, as one."""
    return lambda: {name: sum(map(cpu_seconds, tree(pid)))}


def of_home(home: str) -> CpuSeconds:
    """Of all processes that `loray up` started for this home, by role; "ray" are the cluster's own."""
    return lambda: by_role((title(pid), cpu_seconds(pid)) for pid in with_variable("LORAY_HOME", home))


def by_role(processes: Iterable[tuple[str, float]]) -> Mapping[str, float]:
    """Seconds by role, from (title, seconds)."""
    found: defaultdict[str, float] = defaultdict(float)
    for name, seconds in processes:
        found[next((role for part, role in _ROLES if part in name), "ray")] += seconds
    return found


def idle_cores(cpu: CpuSeconds, *, settle_s: float = _SETTLE_S, seconds: float = _IDLE_S) -> float:
    """Cores that a system uses while it has nothing to do, over `seconds`, after it was left alone for `settle_s`."""
    time.sleep(settle_s)
    before, began = sum(cpu().values()), time.perf_counter()
    time.sleep(seconds)
    return (sum(cpu().values()) - before) / (time.perf_counter() - began)
