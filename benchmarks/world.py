"""What benchmarks run on and in: the machine and its rates, processes, their memory and processor time, and a Ray
cluster on this machine with tiny adapters.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from loray.machine import Machine, Rates, hardware

if TYPE_CHECKING:
    from loray.bases.registry import BaseModel
    from loray.local.cluster import LocalCluster
    from loray.settings import Settings
    from loray.spec import FleetSpec, TrainSpec

Result = TypeVar("Result")
_CPUCLOCK_SCHED = 2  # the scheduler's count, not that of the clock's ticks
_START_S, _END_S = 180.0, 20.0
_QUICK = {"RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


# The machine.


def describe_machine() -> dict[str, str]:
    """CPU, versions, date and commit, without which figures cannot be compared."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "?")
    found = {"cpu": f"{cpu} × {os.cpu_count()}", "python": platform.python_version()}
    found |= {name: metadata.version(name) for name in ("torch", "transformers", "peft")}
    git = shutil.which("git") or "false"
    commit = subprocess.run([git, "rev-parse", "--short=8", "HEAD"], capture_output=True, text=True, check=False)
    return found | {"date": time.strftime("%Y-%m-%d"), "commit": commit.stdout.strip() or "?"}


class MachineRates(NamedTuple):
    """Bytes/s read from memory, and FLOP/s of torch's matrix product in the dtype that is multiplied fastest."""

    bandwidth: float
    flops: float


def measure_rates(device: str, num_threads: int) -> MachineRates:
    """Measure the rates in a separate process, so that this one does not load torch."""
    (rates,) = run_modules([["benchmarks.world", device]], num_threads)
    return MachineRates(**rates)


def measure_machine() -> Machine:
    """The rates that `loray plan` measures, in a separate process with all cores."""
    (rates,) = run_modules([["loray.train.rates"]])
    return Machine(hardware(), Rates.from_json(rates))


def rates_here(name: str) -> MachineRates:
    """Measure the rates of a device in this process, which loads torch."""
    import torch

    from loray.train.rates import fastest_product_flops, read_bandwidth

    device = torch.device(name)
    return MachineRates(read_bandwidth(device), fastest_product_flops(device))


def on_this_machine(recipe: TrainSpec) -> TrainSpec:
    """The recipe in the dtype that trains fast here, as a driver would choose it."""
    from loray.recipes.resolve import on_hardware

    return on_hardware(recipe, hardware()).spec


def load_average() -> float:
    """Processes that ran or were ready to run, averaged over the last minute."""
    return os.getloadavg()[0]


def busy_seconds() -> float:
    """Processor seconds of the whole machine since its start, those that a hypervisor took included."""
    ticks = [int(x) for x in Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()[1:9]]
    idle, waiting = ticks[3:5]
    return (sum(ticks) - idle - waiting) / os.sysconf("SC_CLK_TCK")


def _others_s() -> float:
    ours = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return busy_seconds() - sum(u.ru_utime + u.ru_stime for u in ours)


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


class Speed(NamedTuple):
    """Of all threads together: bytes/s read from memory, and exponentials/s of fp32 from the caches."""

    memory: float
    compute: float


def probe(num_threads: int) -> Callable[[], Speed]:
    """A function that measures the machine's speed in about 60 ms, with as many threads as the systems under test."""
    pool, memory, values, repeats = ThreadPoolExecutor(num_threads), 64 << 20, 1 << 15, 400
    read = [np.ones(memory // 8, dtype=np.int64) for _ in range(num_threads)]
    computed = [np.linspace(-1, 1, 2 * values, dtype=np.float32).reshape(2, -1) for _ in range(num_threads)]

    def exponentials(i: int) -> None:
        for _ in range(repeats):
            np.exp(computed[i][1], out=computed[i][0])

    def seconds(work: Callable[[int], object]) -> float:
        """The shortest of a few times that all threads need together."""
        found = []
        for _ in range(5):
            began = time.perf_counter()
            list(pool.map(work, range(num_threads)))
            found.append(time.perf_counter() - began)
        return min(found)

    def measure() -> Speed:
        memory_s, compute_s = seconds(lambda i: read[i].max()), seconds(exponentials)
        return Speed(num_threads * memory / memory_s, num_threads * repeats * values / compute_s)

    return measure


class Steady:
    """Passes that count are taken while the machine has the speed that it had at the start.

    A virtual machine does not always have it: its host shares the bandwidth of its memory, and at times the time of its
    processors, with others (34 or 62 GB/s, for tens of seconds at a time, on one such machine). `patience_s`: for how
    long all waits and repeated passes of a run may last together.
    """

    _TOLERANCE = 0.2

    def __init__(self, num_threads: int, *, patience_s: float, measure: Callable[[], Speed] | None = None) -> None:
        self._measure, self._left_s = measure or probe(num_threads), patience_s
        found = [self._measure()]
        while len(found) < 9:
            time.sleep(1.0)
            found.append(self._measure())
        self.start = Speed(*(statistics.median(values) for values in zip(*found, strict=True)))
        self.num_repeated = self.num_unsteady = 0

    def run(self, one_pass: Callable[[int], Result]) -> Result:
        """The result of `one_pass`, which is run again if the machine became faster or slower meanwhile. When there is
        no patience left, the result counts as it is. It is given the number of its runs before.
        """
        for attempt in itertools.count():
            began = time.monotonic()
            while not self._is_steady() and time.monotonic() - began < self._left_s:
                time.sleep(1.0)
            self._left_s -= time.monotonic() - began
            began = time.monotonic()
            result = one_pass(attempt)
            if self._is_steady():
                break
            if self._left_s <= 0:
                self.num_unsteady += 1
                break
            self._left_s -= time.monotonic() - began
            self.num_repeated += 1
        return result

    def describe(self) -> str:
        text = f"memory {self.start.memory / 1e9:.1f} GB/s at the start"
        if self.num_repeated:
            text += f"; {self.num_repeated} passes were repeated since the machine became faster or slower"
        if self.num_unsteady:
            text += f"; {self.num_unsteady} count although it did"
        return text

    def _is_steady(self) -> bool:
        now = self._measure()
        return all(abs(a / b - 1) <= self._TOLERANCE for a, b in zip(now, self.start, strict=True))


# Processes.


def cpu_seconds(pid: int) -> float:
    """Of a process and all its threads since its start, in user and system mode; 0 if it has ended."""
    try:
        return time.clock_gettime((~pid << 3) | _CPUCLOCK_SCHED)  # as clock_getcpuclockid(3)
    except OSError:
        return 0.0


def tree(pid: int) -> list[int]:
    """A process and all its descendants."""
    found, todo = [], [pid]
    while todo:
        process = todo.pop()
        found.append(process)
        try:
            for children in Path(f"/proc/{process}/task").glob("*/children"):
                todo += map(int, children.read_text(encoding="utf-8").split())
        except OSError:
            continue  # it has ended
    return found


def with_variable(name: str, value: str) -> list[int]:
    """The processes of this user that were started with this environment variable."""
    pids = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
    return [pid for pid in pids if f"{name}={value}".encode() in _read(pid, "environ").split(b"\0")]


def title(pid: int) -> str:
    """What `ps` shows of its command."""
    return _read(pid, "cmdline").replace(b"\0", b" ").decode(errors="replace").strip()


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def run_modules(commands: Sequence[Sequence[str]], num_threads: int | None = None) -> list[dict[str, Any]]:
    """Run modules with their arguments side by side, and wait; returns the JSON object that each prints last.

    The processes share `num_threads` (default: all cores). If one fails, the others are killed and SystemExit carries
    the end of its stderr.
    """
    threads = max(1, (num_threads or os.cpu_count() or 1) // len(commands))
    env, pipe = os.environ | {"OMP_NUM_THREADS": str(threads), "GLOO_SOCKET_IFNAME": "lo"}, subprocess.PIPE
    workers = [
        subprocess.Popen([sys.executable, "-m", *command], env=env, stdout=pipe, stderr=pipe, text=True)
        for command in commands
    ]
    found = []
    try:
        for worker in workers:
            out, err = worker.communicate()
            if worker.returncode:
                raise SystemExit(f"a worker failed:\n{err[-2000:]}")
            found.append(json.loads(out.splitlines()[-1]))
    finally:
        for worker in workers:
            worker.kill()  # after a failure the other ranks would wait for the failed one
            worker.wait()
    return found


def run_loray(home: Path, *arguments: str) -> str:
    """Run a command with a home and without this process's settings; returns what it prints. SystemExit if it fails."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("LORAY_", "RAY_"))}
    env |= {"LORAY_HOME": str(home), "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-m", "loray.cli.main", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"loray {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


@contextmanager
def running(
    command: Sequence[str], log: Path, env: Mapping[str, str], *, pipes: bool = False
) -> Iterator[subprocess.Popen[str]]:
    """A process in a new session, which is ended with all its children after the block. `log` keeps what it prints;
    with `pipes` only its stderr.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    stdin, stdout = (subprocess.PIPE, subprocess.PIPE) if pipes else (subprocess.DEVNULL, None)
    with log.open("w", encoding="utf-8") as out:
        process = subprocess.Popen(
            list(command), stdin=stdin, stdout=stdout or out, stderr=out, env=env, text=True, start_new_session=True
        )
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
                process.wait(_END_S)
            except ProcessLookupError:
                break  # all its children have ended too
            except subprocess.TimeoutExpired:
                continue
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                pipe.close()


def until(is_so: Callable[[], bool], name: str, timeout_s: float = _START_S) -> float:
    """Wait; the seconds that it took. SystemExit where it does not become so in time."""
    began = time.monotonic()
    while not is_so():
        if time.monotonic() > began + timeout_s:
            raise SystemExit(f"not within {timeout_s:.0f} s: {name}")
        time.sleep(0.1)
    return time.monotonic() - began


def is_healthy(port: int) -> bool:
    """Whether the server at a port of this machine answers /health."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, HTTPException):
        return False
    finally:
        connection.close()


# Memory.


def resident_bytes() -> int:
    """Resident set of this process."""
    return _status("VmRSS")


def peak_bytes() -> int:
    """The largest resident set of this process since `reset_peak`."""
    return _status("VmHWM")


def reset_peak() -> None:
    """Start `peak_bytes` anew from the present resident set."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{field}:"))


class PeakMemory:
    """`nbytes`: the largest proportional set size of the tree of `pid` among the samples: shared pages count once. 0
    without a process.
    """

    def __init__(self, pid: int | None) -> None:
        self._pid = pid
        self.nbytes = 0

    def sample(self) -> None:
        lines = [line for pid in tree(self._pid or 0) for line in _read(pid, "smaps_rollup").splitlines()]
        total = sum(int(line.split()[1]) << 10 for line in lines if line.startswith(b"Pss:"))
        self.nbytes = max(self.nbytes, total)


@contextmanager
def watch_memory(pid: int | None) -> Iterator[PeakMemory]:
    """Sample the tree of `pid` four times a second until the block ends. The caller may take further samples later."""
    peak, over = PeakMemory(pid), threading.Event()

    def sample() -> None:
        peak.sample()
        while not over.wait(0.25):
            peak.sample()

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        over.set()
        thread.join()


# A Ray cluster.


@dataclass(frozen=True)
class World:
    """`names` are the adapters'; `total_bytes` what they have together, as published."""

    folder: Path
    settings: Settings
    local: LocalCluster
    base: BaseModel
    names: list[str]
    total_bytes: int

    @contextmanager
    def deployed(self, fleet: FleetSpec, **application: Any) -> Iterator[int]:
        """The product's application of models, or with other fields of Serve's configuration; yields its port when it
        is healthy.
        """
        from loray.spec import APPLICATION
        from serve_apps.deployment import ServeApi, serve_config

        config = serve_config(fleet, self.settings)
        config["applications"] = [a | application for a in config["applications"] if a["name"] == APPLICATION]
        api, port = ServeApi(self.local.address), config["http_options"]["port"]
        api.deploy(config)
        *_, state = api.watch(timeout_s=_START_S)
        try:
            if not state.is_running:
                raise SystemExit(f"the deployment failed: {state.reason}")
            until(lambda: is_healthy(port), "the endpoint is healthy")
            yield port
        finally:
            api.delete()
            until(lambda: api.state() is None, "the deployment is deleted")


@contextmanager
def started_cluster(
    num_adapters: int,
    num_cpus: int,
    adapter: Any,
    *,
    base: str = "tiny",
    source: str | None = None,
    environment: Mapping[str, str] = MappingProxyType({}),
    published: Callable[[], None] = lambda: None,
) -> Iterator[World]:
    """A temporary home with a tiny base and copies of PEFT's `adapter`, and a local cluster with so many processors.
    `source`: of another base than a tiny one, as `loray base add` takes it. Its cluster is `loray up`'s; that of a tiny
    one notices sooner what has changed, which costs a tenth of a processor.

    `environment`: further settings, as the store's. `published` is called before the cluster starts.
    """
    from loray.bases.registry import add_base
    from loray.catalog import Catalog
    from loray.local.cluster import start_local_cluster, stop_local_cluster
    from loray.settings import Settings
    from tests.fixtures.publisher import publish_copies
    from tests.fixtures.tiny import write_checkpoint

    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="loray-bench-", ignore_cleanup_errors=True))
        )
        home = folder / "home"
        settings = Settings.from_env({"LORAY_HOME": str(home), "LORAY_LOG_LEVEL": "WARNING", **environment})
        is_tiny = source is None
        source = source or str(write_checkpoint(folder / "checkpoint", max_position_embeddings=4096))
        model = add_base(source, home=home, name=base)
        names = publish_copies(folder, model, settings, [adapter], num_adapters)
        published()
        total = num_adapters * Catalog(settings.catalog).adapters.resolve(names[0]).nbytes if names else 0
        local = start_local_cluster(home, num_cpus=num_cpus, env=settings.to_env() | (_QUICK if is_tiny else {}))
        stack.callback(stop_local_cluster, home)
        os.environ.update(local.client_env)  # before Ray is imported
        yield World(folder, settings, local, model, names, total)


@contextmanager
def started_s3(folder: Path, *, keep: bool = False) -> Iterator[Any]:
    """A local S3 server, `loray.local.s3.LocalS3`, which may be killed and started again meanwhile. `keep`: its data,
    for a later run.
    """
    from loray.local.processes import kill
    from loray.local.s3 import current_local_s3, start_local_s3, stop_local_s3

    try:
        yield start_local_s3(folder)
    finally:
        if not keep and (server := current_local_s3(folder)) is not None:
            kill(server.pid, signal.SIGKILL)  # otherwise it would save its data first
        stop_local_s3(folder)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(rates_here(sys.argv[1])._asdict()) + "\n")
