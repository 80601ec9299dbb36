"""The machine that a benchmark runs on: what it is, what it computes and moves, how busy it was."""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

_PACKAGES = ("torch", "transformers", "peft")


def describe_machine() -> dict[str, str]:
    """CPU, versions, date: what figures must be read with."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "?")
    found = {"cpu": f"{cpu} × {os.cpu_count()}", "python": platform.python_version()}
    found |= {name: metadata.version(name) for name in _PACKAGES}
    return found | {"date": time.strftime("%Y-%m-%d")}


class MachineRates(NamedTuple):
    """Bytes/s read from memory, and FLOP/s of torch's own matrix product in bf16."""

    bandwidth: float
    flops: float


def measure_rates(device: str, num_threads: int) -> MachineRates:
    """In a process of its own, so that nothing of torch stays behind in this one."""
    command = [sys.executable, "-m", "benchmarks.machine", device]
    env = os.environ | {"OMP_NUM_THREADS": str(num_threads)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return MachineRates(*json.loads(done.stdout))


def _rates(name: str) -> MachineRates:
    import torch

    from loray.train.rates import product_flops, read_bandwidth

    device = torch.device(name)
    return MachineRates(read_bandwidth(device), product_flops(device, torch.bfloat16))


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


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_rates(sys.argv[1])))
