"""The machine that a benchmark runs on: its hardware and versions, its rates, and its load."""

from __future__ import annotations

import json
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from benchmarks import workers
from loray.machine import Machine, Rates, hardware
from loray.recipes.resolve import on_hardware
from loray.spec import TrainSpec

_PACKAGES = ("torch", "transformers", "peft")


def describe_machine() -> dict[str, str]:
    """CPU, versions and date, without which figures cannot be compared."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "?")
    found = {"cpu": f"{cpu} × {os.cpu_count()}", "python": platform.python_version()}
    found |= {name: metadata.version(name) for name in _PACKAGES}
    return found | {"date": time.strftime("%Y-%m-%d")}


class MachineRates(NamedTuple):
    """Bytes/s read from memory, and FLOP/s of torch's matrix product in the dtype that is multiplied fastest."""

    bandwidth: float
    flops: float


def measure_rates(device: str, num_threads: int) -> MachineRates:
    """Measure the rates in a separate process, so that this one does not load torch."""
    (rates,) = workers.run([["benchmarks.machine", device]], num_threads)
    return MachineRates(**rates)


def measure_machine() -> Machine:
    """The rates that `loray plan` measures, in a separate process with all cores."""
    (rates,) = workers.run([["loray.train.rates"]])
    return Machine(hardware(), Rates.from_json(rates))


def rates_here(name: str) -> MachineRates:
    """Measure the rates of a device in this process, which loads torch."""
    import torch

    from loray.train.rates import fastest_product_flops, read_bandwidth

    device = torch.device(name)
    return MachineRates(read_bandwidth(device), fastest_product_flops(device))


def on_this_machine(recipe: TrainSpec) -> TrainSpec:
    """The recipe in the dtype that trains fast here, as a driver would choose it."""
    return on_hardware(recipe, hardware()).spec


def load_average() -> float:
    """Processes that ran or were ready to run, averaged over the last minute."""
    return os.getloadavg()[0]


class Disturbance:
    """`load`: the load average before the block. `cores`: processors that other processes kept busy during the block,
    without this process and its children.
    """

    def __init__(self) -> None:
        self.load = load_average()
        self.cores = float("nan")


@contextmanager
def watch() -> Iterator[Disturbance]:
    """Measure what other processes compute during the block. Children must end inside it: their processor time counts
    as this process's only from then on.
    """
    found, began, before = Disturbance(), time.perf_counter(), _others_s()
    yield found
    found.cores = max(0.0, (_others_s() - before) / (time.perf_counter() - began))


def busy_seconds() -> float:
    """Processor seconds of the whole machine since its start, those that a hypervisor took included."""
    ticks = [int(x) for x in Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:9]]
    idle, waiting = ticks[3:5]
    return (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK")


def _others_s() -> float:
    """`busy_seconds` less those of this process and its ended children."""
    ours = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return busy_seconds() - sum(u.ru_utime + u.ru_stime for u in ours)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(rates_here(sys.argv[1])._asdict()) + "\n")
