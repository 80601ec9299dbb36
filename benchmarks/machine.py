"""The machine that a benchmark runs on: what it is, how busy it was, what a process holds."""

from __future__ import annotations

import os
import platform
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

_PACKAGES = ("torch", "transformers", "peft")


def machine_facts() -> dict[str, str]:
    """CPU, versions, date: what figures must be read with."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "?")
    found = {"cpu": f"{cpu} × {os.cpu_count()}", "python": platform.python_version()}
    found |= {name: metadata.version(name) for name in _PACKAGES}
    return found | {"date": time.strftime("%Y-%m-%d")}


def load_average() -> float:
    """Processes that ran or wanted to, averaged over the last minute."""
    return os.getloadavg()[0]


class Disturbance:
    """`load` before; `cores`, how many processors others kept busy meanwhile: all but this process and its children."""

    def __init__(self) -> None:
        self.load = load_average()
        self.cores = float("nan")


@contextmanager
def watch() -> Iterator[Disturbance]:
    """Children must have ended when the block does, for what they used to count as ours."""
    found, began, before = Disturbance(), time.perf_counter(), _others_s()
    yield found
    found.cores = max(0.0, (_others_s() - before) / (time.perf_counter() - began))


def _others_s() -> float:
    """Processor seconds of the whole machine (time that a hypervisor took too), less ours."""
    ticks = [int(x) for x in Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:9]]
    idle, waiting = ticks[3:5]
    ours = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK") - sum(u.ru_utime + u.ru_stime for u in ours)


def resident_bytes() -> int:
    """Of this process."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The most that was resident since `forget_peak`."""
    return _status("VmHWM")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))
