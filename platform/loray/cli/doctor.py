"""`loray doctor`: checks of this machine and of the deployment that it is to run, each a function in `CHECKS`."""

from __future__ import annotations

import errno
import os
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, metadata, requires, version
from pathlib import Path
from platform import python_version
from resource import RLIM_INFINITY, RLIMIT_NOFILE, getrlimit
from typing import Literal, NamedTuple

import click
import psutil
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rich.markup import escape

from loray.bases.checkpoint import check_tensors, stored_dtype, tensor_infos
from loray.bases.config import ModelConfig
from loray.bases.registry import get_base, verify_base
from loray.cli.base import FORMS
from loray.cli.output import console, emit, json_option
from loray.cli.plan import measured
from loray.errors import (
    BaseNotFound,
    ClusterError,
    IntegrityError,
    LorayError,
    PermissionDenied,
    SpecError,
    Unauthenticated,
)
from loray.local.cluster import OBJECT_STORE_BYTES, current_cluster, dead_cluster
from loray.local.processes import check_port, session_members
from loray.local.s3 import describe_store, is_store_down
from loray.local.serving import ServingAddress, raylets, serving_urls, standalone_servers
from loray.locations import FileLocation, S3Location, http_url, parse_location
from loray.machine import Machine, memory_left, serving_dtype
from loray.planning.devices import gpu_here, host
from loray.planning.plan import make_plan
from loray.planning.run import shape_of
from loray.recipes.defaults import complete, size_of
from loray.recipes.resolve import on_hardware
from loray.settings import Settings
from loray.spec import DTYPE_BYTES, FleetSpec, ServeSpec, TrainSpec, format_size, read_mapping

_SHM = Path("/dev/shm")
_LEAST_DISK = 1 << 30
_LOW_DISK = 0.05  # share of the disk
_OTHER_FILES = 256  # libraries, adapters, logs, connections between processes
_BUILD_TIMEOUT_S = 180.0  # of the kernels: the first build takes tens of seconds on one core
_SERVER_TIMEOUT_S = 10.0
_CLOCK_TIMEOUT_S = 5.0
_SKEW_S, _MOST_SKEW_S = 30.0, 300.0  # S3 refuses what is signed more than 15 minutes before or after
_INSTALL = "apt-get install g++  (or set CXX to a C++17 compiler)"
_ROW_LENGTH = 512
_REQUESTS, _PROMPT, _ANSWER = 32, 64, 32  # of the load that the estimate of serving is for
# Of what products and reading the weights alone would take, measured with SmolLM2-135M: 0.76 on two cores with AVX2
# (110 tokens/s), 0.78 on two with AVX512-BF16 (936 tokens/s).
_SERVED_SHARE = 0.77

Severity = Literal["ok", "warning", "error"]
_STYLES: Mapping[Severity, str] = {"ok": "green", "warning": "yellow", "error": "red"}


class CheckResult(NamedTuple):
    """Says what a check found. `warning`: it works, but slower or not for long. `mend`: a command, or what to do."""

    severity: Severity
    message: str
    mend: str | None = None


@dataclass(frozen=True, slots=True)
class Situation:
    """Holds what is examined. `spec`: the deployment that this machine is to run, or one base of it, beside `others`.
    `deep`: bytes are hashed, which takes as long as reading them. `file`: where the spec is; None: on the command line.
    """

    settings: Settings
    spec: ServeSpec
    deep: bool = False
    others: tuple[ServeSpec, ...] = ()
    file: Path | None = None


Check = Callable[[Situation], CheckResult]
ok = partial(CheckResult, "ok")
warning = partial(CheckResult, "warning")
error = partial(CheckResult, "error")


def python(s: Situation) -> CheckResult:
    try:
        wanted = metadata("loray")["Requires-Python"]
    except PackageNotFoundError:
        wanted = ">=3.11"
    if SpecifierSet(wanted).contains(python_version(), prereleases=True):
        return ok(f"Python {python_version()}")
    return error(
        f"Python {python_version()} does not run loray, which needs {wanted}",
        "python3.12 -m venv .venv && .venv/bin/pip install loray",
    )


def packages(s: Situation) -> CheckResult:
    try:
        lines = requires("loray") or []
    except PackageNotFoundError:
        return error("loray is not installed, so train, serve and up are missing", "pip install -e .")
    needed = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate({"extra": ""})]
    wrong, install = [], []
    for required in needed:
        try:
            found = version(required.name)
        except PackageNotFoundError:
            wrong.append(f"{required.name} is missing")
        else:
            if required.specifier.contains(found, prereleases=True):
                continue
            wrong.append(f"{required.name} {found} is not {required.specifier}")
        install.append(f"{required.name}{required.specifier}")
    if wrong:
        return error("; ".join(wrong), f"pip install {shlex.join(install)}")
    return ok(f"{len(needed)} packages have versions that fit")


def server(s: Situation) -> CheckResult:
    url = s.settings.url
    if url is None:
        return ok("LORAY_URL is not set: commands work on this machine")
    from loray.client import LorayClient

    try:
        with LorayClient(url, timeout=_SERVER_TIMEOUT_S) as client:
            num_models = len(client.models())
    except (Unauthenticated, PermissionDenied) as e:
        given = "is refused" if s.settings.api_key else "is missing"
        return error(
            f"the server at LORAY_URL={url} answers, and the API key {given}: {e}",
            "export LORAY_API_KEY=KEY  (an administrator makes one with `loray keys create`)",
        )
    except LorayError as e:
        return error(f"LORAY_URL={url}: {e}", "export LORAY_URL=http://HOST:PORT of a server, or unset LORAY_URL")
    return ok(f"the server at {url} answers: {num_models} models")


def home(s: Situation) -> CheckResult:
    mend = "export LORAY_HOME=FOLDER  (one that is yours, as ~/.loray)"
    return _writable(f"LORAY_HOME={s.settings.home}", s.settings.home, mend)


def existing(path: Path) -> Path:
    """Returns the path, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.parents) if p.exists())


def _writable(what: str, folder: Path, mend: str) -> CheckResult:
    """Checks that something can be written to the folder, or made where it does not exist yet."""
    nearest = existing(folder)
    if not nearest.is_dir():
        return error(f"{what} cannot be written to: {nearest} is a file", mend)
    try:
        with tempfile.TemporaryFile(dir=nearest):
            return ok(f"{what} can be written to")
    except OSError as e:
        return error(f"{what} cannot be written to: {e.strerror or e}", mend)


def disk(s: Situation) -> CheckResult:
    total, _, free = shutil.disk_usage(existing(s.settings.home))
    told = f"the disk of {s.settings.home} has {format_size(free)} of {format_size(total)} free"
    mend = "loray store gc --yes  (or point LORAY_HOME at a larger disk)"
    if free < _LEAST_DISK:
        return error(told, mend)
    return warning(told, mend) if free < _LOW_DISK * total else ok(told)


def memory(s: Situation) -> CheckResult:
    """Counts all bases on the CPU together, and says what mends it of the one that is examined."""
    spec, available = s.spec, memory_left()
    if not spec.device.startswith("cpu"):
        if spec.pool_bytes is None:
            share = f"{spec.gpu_memory_utilization:.0%} of its memory"
            return ok(f"weights are on {spec.device}; the pool has what they and the steps leave of {share}")
        return ok(f"weights and a pool of {format_size(spec.pool_bytes)} are on {spec.device}")
    if standalone_servers(s.settings.home) or current_cluster(s.settings.home):
        return ok("what is served has its memory")
    least, most, parts = 0, 0, []
    for b in (spec, *s.others):
        if b.device.startswith("cpu"):
            num, weights, pool = max(1, b.min_replicas), _weights(s, b.base), b.fixed_pool_bytes or 0
            least += num * (weights + pool)
            most += num * (weights + pool + b.host_bytes)
            of = f" of {b.base}" if s.others else ""
            parts.append(f"{num} × (weights {format_size(weights)} + pool {format_size(pool)}{of})")
    told = f"{format_size(available)} of memory are available"
    if available < least:
        num, pool = max(1, spec.min_replicas), spec.fixed_pool_bytes or 0
        without_pool = available - (least - num * pool)
        fitting = f"{max(16, without_pool // num // 2 >> 20)}MiB"
        needed = f"{format_size(least)} are needed: {' + '.join(parts)}"
        return error(f"{told}, and {needed}", _with(s, "pool_bytes", fitting))
    if available < most:
        fitting = f"{(available - least) >> 21}MiB"
        return warning(f"{told}; with host_bytes full, {format_size(most)} are needed", _with(s, "host_bytes", fitting))
    return ok(f"{told}, {format_size(most)} needed at most")


def _weights(s: Situation, name: str) -> int:
    """Returns the bytes of a base on a CPU; 0 where it is missing, which another check says."""
    try:
        base = get_base(s.settings.home, name)
        config, stored = base.config, sum(info.stop - info.start for info in tensor_infos(base.path))
        if config.quantization is None or config.quantization.is_kept(on_gpu=False):
            return stored
        embedding = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
        return DTYPE_BYTES[stored_dtype(base.path)] * (config.num_matrix_elements + embedding)  # it is dequantised
    except (LorayError, OSError, ValueError):
        return 0


def _with(s: Situation, field: str, value: str) -> str:
    """Says what gives the examined base another value, and leaves the rest of its deployment."""
    if s.file is not None:
        return f"set {field} of {s.spec.base} in {s.file} to {value}"
    return f"loray up --base {s.spec.base} --{field.replace('_', '-')} {value}"


def shm(s: Situation) -> CheckResult:
    free = shutil.disk_usage(_SHM).free if _SHM.is_dir() else 0
    told = f"has {format_size(free)} free" if _SHM.is_dir() else "is missing"
    if free >= OBJECT_STORE_BYTES or (_SHM.is_dir() and current_cluster(s.settings.home)):
        return ok(f"/dev/shm {told}")
    return warning(
        f"/dev/shm {told}, and Ray's object store takes {format_size(OBJECT_STORE_BYTES)}: it will be on disk, slower",
        "mount -o remount,size=1G /dev/shm  (in a container: docker run --shm-size=1g)",
    )


def files(s: Situation) -> CheckResult:
    """Counts a connection to its client for each request, and for a queued one too."""
    least = _OTHER_FILES + sum(b.max_queued + b.max_num_seqs * b.max_replicas for b in (s.spec, *s.others))
    limit, hard = (sys.maxsize if n == RLIM_INFINITY else n for n in getrlimit(RLIMIT_NOFILE))
    if limit >= least:
        return ok(f"{limit:,} open files are allowed")
    mend = f"ulimit -n {least}"
    if hard < least:
        mend = f"echo '* - nofile {least}' | sudo tee -a /etc/security/limits.conf  (and log in again)"
    return error(f"{limit:,} open files are allowed, and {least:,} may be needed: a connection for each request", mend)


def compiler(s: Situation) -> CheckResult:
    chosen = os.environ.get("CXX")
    found = [name for name in (chosen, "g++", "c++", "clang++") if name and shutil.which(name)]
    if not found:
        return error("there is no C++ compiler: without compiled kernels, the slow reference kernels run", _INSTALL)
    if chosen and found[0] != chosen:
        return error(f"CXX={chosen} is not a program", "unset CXX")
    return ok(f"C++ compiler: {found[0]}")


def kernels(s: Situation) -> CheckResult:
    if s.spec.device.startswith("cuda"):
        return ok("the CPU's kernels are not needed on a GPU")
    reason = kernels_problem()
    if reason is None:
        return ok("the CPU's kernels build and load")
    told = f"the CPU's kernels do not load, and slow reference kernels run instead: {reason}"
    if "cannot be kept" in reason:
        return error(told, "export XDG_CACHE_HOME=FOLDER  (one that can be written)")
    if "compile" in reason:
        return error(told, _INSTALL)
    return error(told, "rm -r ~/.cache/loray/kernels  (they are built again at the next start)")


def kernels_problem() -> str | None:
    """Says why the CPU's kernels do not load; None where they do.

    They are loaded in a process of its own, which a library for other CPUs ends with a signal.
    """
    command = [sys.executable, "-c", "from loray.cli.doctor import load_kernels; raise SystemExit(load_kernels())"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_BUILD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return f"not built within {_BUILD_TIMEOUT_S:.0f} s"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"ended by signal {-done.returncode} while it loaded"
    return done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit code {done.returncode}"


def load_kernels() -> str | int:
    """Returns what a process is to exit with: 0, or why the CPU's kernels cannot be had."""
    from loray_kernels import BackendUnavailable, backend

    try:
        backend("cpu")
    except (BackendUnavailable, OSError) as e:
        return " ".join(str(e).split())
    return 0


def base(s: Situation) -> CheckResult:
    """Reads the weights' headers; hashes all bytes with `deep`."""
    name, add = s.spec.base, f"loray base add {s.spec.base}"
    try:
        found = get_base(s.settings.home, name)
    except BaseNotFound:
        return error(f"the base model {name} is not on this machine", add)
    except (LorayError, OSError) as e:
        return error(f"the base model {name} is damaged: {e}", f"rm -r {s.settings.home / 'bases' / name} && {add}")
    try:
        if s.deep:
            verify_base(found)
        else:
            check_tensors(found.path, found.config)
    except (LorayError, OSError, ValueError) as e:
        mend = f"loray base add {shlex.quote(found.source.removeprefix('hf:'))} --name {name}"
        if form := re.fullmatch(r"(\S+) of (\S+) \(\w{12}\)", found.source):  # as `bases.rounding` says it
            mend = f"loray base add {form[2]} --quantise {form[1]} --name {name}"
            if form[1] not in FORMS:
                mend = f"rm -r {found.path}  (training with that quantization of {form[2]} makes it again)"
        return error(f"the base model {name} is damaged: {e}", mend)
    return ok(f"base model {name}{', every byte' if s.deep else ''}")


def machine(s: Situation) -> CheckResult:
    """Measures this machine where that has not been done."""
    try:
        machine = measured(s.settings.home, even_if_busy=False)
    except LorayError as e:
        return ok(f"{Machine.here(s.settings.home).hardware.describe()}; not measured: {e}")
    told = machine.hardware.describe()
    if machine.rates is None:
        return ok(f"{told}; not measured yet, because it is busy")
    products = ", ".join(f"{dtype} {flops / 1e9:,.0f}" for dtype, flops in machine.rates.products.items())
    told += f"; products in GFLOP/s: {products}; memory {machine.rates.bandwidth / 1e9:.0f} GB/s"
    if (gpu := machine.rates.gpu) is not None:
        told += f"; GPU {gpu.flops / 1e12:,.0f} TFLOP/s, {gpu.bandwidth / 1e9:,.0f} GB/s"
    return ok(told)


def speed(s: Situation) -> CheckResult:
    """Estimates the base's speeds from the rates that `rates` has measured."""
    try:
        config = get_base(s.settings.home, s.spec.base).config
    except (LorayError, OSError):
        return ok(f"without the base {s.spec.base} there is no estimate")  # another check says that it is missing
    machine = Machine.here(s.settings.home)
    return ok(f"{s.spec.base}: {_training(config, machine)}; {_serving(s.spec, config, machine)}")


def _training(config: ModelConfig, machine: Machine) -> str:
    fields = {"name": "estimate", "data": {"train": "data.jsonl", "max_length": _ROW_LENGTH}}
    recipe = TrainSpec.parse(complete(fields, size_of(config)), source="the usual recipe")
    spec, why = on_hardware(recipe, machine.hardware)
    device = gpu_here(machine) if spec.use_gpu else host(machine, 1)
    told = f"trains in {spec.dtype} ({why})"
    if device is not None and (machine.rates is not None or not device.is_host):
        time = make_plan(shape_of(spec, config, dtype=device.training_dtype), device).time
        told += f", LoRA at about {_about(time.tokens_per_s)} tokens/s"
    return told


def _serving(spec: ServeSpec, config: ModelConfig, machine: Machine) -> str:
    use_gpu = not spec.device.startswith("cpu")
    dtype, why = serving_dtype(machine.hardware, use_gpu=use_gpu, has_kernels=True)
    if spec.dtype != "auto":
        dtype, why = spec.dtype, "as given"
    steps = f"steps of up to {spec.max_num_seqs} requests and {spec.max_num_batched_tokens:,} tokens"
    told, rates = f"serves in {dtype} ({why}) with {steps}", machine.rates
    if rates is None or (use_gpu and rates.gpu is None):
        return told
    flops, bandwidth = rates.fastest, rates.bandwidth
    if use_gpu and rates.gpu is not None:
        flops, bandwidth = rates.gpu.flops, rates.gpu.bandwidth
    active = config.num_active_elements
    prompts = 2.0 * (active - config.vocab_size * config.hidden_size) * _REQUESTS * _PROMPT / flops
    step = max(config.matrix_bytes(spec.element_bytes, on_gpu=use_gpu) / bandwidth, 2.0 * active * _REQUESTS / flops)
    tokens_per_s = _SERVED_SHARE * _REQUESTS * _ANSWER / (prompts + _ANSWER * step)
    return f"{told}; {_REQUESTS} requests at once at about {_about(tokens_per_s)} tokens/s"


def _about(value: float) -> str:
    """Rounds to two digits: estimates are not better."""
    return f"{float(f'{value:.2g}'):,.0f}"


def catalog(s: Situation) -> CheckResult:
    from loray.catalog.database import HEAD, OLDEST, revision_of, shown_url

    url = s.settings.catalog
    try:
        revision = revision_of(url)
    except IntegrityError as e:
        return error(str(e), "loray catalog restore FILE  (a backup, into a catalog with another name)")
    except (LorayError, OSError) as e:
        mend = "start the database, or set LORAY_CATALOG to where it is"
        return error(str(e), "unset LORAY_CATALOG  (to use SQLite in LORAY_HOME)" if url[:6] == "sqlite" else mend)
    if revision is None:
        return ok("the catalog is empty; its tables are made at first use")
    if OLDEST <= revision <= HEAD:
        return ok(f"catalog {shown_url(url)} answers")
    if revision < OLDEST:
        return error(
            f"the catalog was made before the first release (revision {revision})",
            "LORAY_CATALOG=sqlite:///$HOME/.loray/new.db loray adapters import FOLDER --name NAME  (for each adapter)",
        )
    return error(
        f"the catalog was migrated by a later loray (revision {revision}, this one knows {HEAD})",
        "pip install --upgrade loray",
    )


def store(s: Situation) -> CheckResult:
    location = parse_location(s.settings.store)
    if isinstance(location, FileLocation):
        return _writable(f"store {location.url}", location.folder, f"chown -R $USER {location.folder}")
    if is_store_down(s.settings):
        return ok(f"store {describe_store(s.settings)}")
    from loray.store.s3 import S3Store

    try:
        S3Store(location, quick=True).check()
    except (LorayError, OSError) as e:
        return error(f"store {location.url}: {e}", "set LORAY_STORE (s3://bucket?endpoint_url=…) and the keys of AWS_…")
    return ok(f"store {location.url} can be written to")


def clock(s: Situation) -> CheckResult:
    location = parse_location(s.settings.store)
    ahead = None if is_store_down(s.settings) else _seconds_ahead(location)
    if ahead is None:
        return ok("the store's clock could not be compared")
    told = f"this machine's clock is {abs(ahead):,.0f} s {'ahead of' if ahead > 0 else 'behind'} the store's"
    mend = "sudo timedatectl set-ntp true"
    if abs(ahead) >= _MOST_SKEW_S:
        return error(f"{told}: S3 refuses requests, and garbage is judged by its age", mend)
    return warning(told, mend) if abs(ahead) >= _SKEW_S else ok("the clocks of this machine and of the store agree")


def _seconds_ahead(location: FileLocation | S3Location) -> float | None:
    """Compares this machine's clock with what the file system writes, which may be another machine's, or with the
    header Date of the server, whose answers have it also where they refuse. None where there is no such time.
    """
    from loray.store.s3 import endpoint_of, region_of

    try:
        if isinstance(location, FileLocation):
            with tempfile.NamedTemporaryFile(dir=location.folder) as file:
                return time.time() - os.fstat(file.fileno()).st_mtime
        url = endpoint_of(location) or f"https://s3.{region_of(location) or 'us-east-1'}.amazonaws.com"
        with urllib.request.urlopen(url, timeout=_CLOCK_TIMEOUT_S) as response:
            date = response.headers.get("Date")
    except urllib.error.HTTPError as e:
        date = e.headers.get("Date")
    except (OSError, ValueError):
        return None
    return time.time() - parsedate_to_datetime(date).timestamp() if date else None


def cluster(s: Situation) -> CheckResult:
    home = s.settings.home
    if s.settings.address is not None:
        return ok(f"LORAY_ADDRESS={s.settings.address} names a cluster")
    if (running := current_cluster(home)) is not None:
        return ok(f"Ray runs at {running.address} as process {running.pid}")
    dead = dead_cluster(home)
    if dead is None:
        return ok("no Ray cluster runs")
    left = len(session_members(dead.pid)) if dead.is_of_this_boot else 0
    also = f", and {left} of its processes go on" if left else ""
    return error(f"the Ray cluster of an earlier `loray up` (process {dead.pid}) has died{also}", "loray down")


def encryption(s: Situation) -> CheckResult:
    """Asks the nodes themselves: what this process' environment says is not what they run with."""
    if s.settings.address is None:
        return ok("one machine: there is no network between nodes")
    try:
        nodes = raylets(http_url(s.settings.address))
    except ClusterError as e:
        return ok(f"the nodes of LORAY_ADDRESS={s.settings.address} could not be asked for TLS: {e}")
    told = f"the cluster at LORAY_ADDRESS={s.settings.address} has {len(nodes)} nodes"
    if len({node.host for node in nodes}) < 2:
        return ok(f"{told} on one machine")
    speak = [_speaks_tls(node) for node in nodes]
    if False in speak:
        return warning(
            f"{told}, and what goes between them is not encrypted: prompts, answers and adapters",
            "RAY_USE_TLS=1 with RAY_TLS_SERVER_CERT, RAY_TLS_SERVER_KEY and RAY_TLS_CA_CERT on every node, or the "
            "component infra/kuberay/tls",
        )
    if None in speak:
        return ok(f"{told}; whether they use TLS cannot be seen from this machine")
    return ok(f"{told}, with TLS between them")


def _speaks_tls(node: ServingAddress) -> bool | None:
    """Tries a handshake; None where nothing answers."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # whose certificate it is, is not the question
    context.set_alpn_protocols(["h2"])
    try:
        connection = socket.create_connection(node, timeout=_SERVER_TIMEOUT_S)
    except OSError:
        return None
    with connection:
        try:
            context.wrap_socket(connection).close()
        except ssl.SSLError as e:
            return "ALERT" in (e.reason or "")  # of a server that wants a certificate
        except ConnectionError:
            return False
        except OSError:
            return None
    return True


def port(s: Situation) -> CheckResult:
    host, number = s.spec.host, s.spec.port
    try:
        check_port(host, number)
        return ok(f"port {number} is free")
    except OSError as e:
        reason = e
    try:
        ours = serving_urls(s.settings)
    except LorayError as e:
        return error(str(e), "loray down")
    if ServingAddress(host, number).url in ours:
        return ok(f"loray serves at port {number}")
    mend = f"loray up --port {number + 1}" if s.file is None else f"loray up --spec {s.file} --port {number + 1}"
    if reason.errno != errno.EADDRINUSE:
        return error(f"nothing can listen at {host}:{number}: {reason.strerror}", mend)
    return error(f"port {number} is taken by {_holder(number)}", mend)


def _holder(number: int) -> str:
    try:
        connections = psutil.net_connections("tcp")
        pids = {c.pid for c in connections if c.laddr and c.laddr.port == number and c.status == "LISTEN"}
        (pid,) = pids - {None}
        return f"process {pid} ({psutil.Process(pid).name()})"
    except (psutil.Error, ValueError, OSError):  # another user's, or it has ended
        return "another program"


# In the order in which they are shown, under the functions' names.
_ANYWHERE: tuple[Check, ...] = (python, packages, server)  # also where commands ask the server of LORAY_URL
CHECKS: tuple[Check, ...] = (
    *_ANYWHERE,
    *(home, disk, memory, shm, files, compiler, kernels, base, machine, speed),
    *(catalog, store, clock, cluster, encryption, port),
)


def examined(checks: Iterable[Check], situation: Situation) -> Iterator[tuple[str, CheckResult]]:
    """Yields each check's name and result. A check that fails itself is an error too, and the others go on."""
    for check in checks:
        try:
            yield check.__name__, check(situation)
        except (LorayError, OSError) as e:
            yield check.__name__, error(str(e), "LORAY_LOG_LEVEL=DEBUG loray doctor")


@click.command()
@click.option(
    "--spec", "spec_file", type=click.Path(path_type=Path), help="The deployment, a YAML file as of `loray up`."
)
@click.option("--base", "base_name", help="The base model that is to be served (default smollm2).")
@click.option("--port", type=int, help="The port that is to be served at (default 8000).")
@click.option("--deep", is_flag=True, help="Hash the whole base model.")
@click.option("--here", is_flag=True, help="Also what serving on this machine needs, where LORAY_URL names a server.")
@json_option
def doctor(
    spec_file: Path | None, base_name: str | None, port: int | None, deep: bool, here: bool, as_json: bool
) -> None:
    """Find what is wrong with this machine and the deployment, and say what mends it.

    Changes nothing, apart from compiling kernels and measuring the machine once. Exits with 1 where there is an error;
    warnings alone are no error.
    """
    settings = Settings.from_env()
    spec, others = _specs(spec_file, base_name, port)
    situation = Situation(settings, spec, deep, others, spec_file)
    chosen = CHECKS if here or settings.url is None else _ANYWHERE
    results: list[tuple[str, CheckResult]] = []
    out = console()
    for name, result in examined(chosen, situation):
        results.append((name, result))
        if not as_json:
            style = _STYLES[result.severity]
            out.print(f"[{style}]{result.severity:<8}[/] {name:<10} {escape(result.message)}", soft_wrap=True)
            if result.mend is not None:
                out.print(f"{'':<19} → [bold]{escape(result.mend)}[/]", soft_wrap=True)
    errors = sum(result.severity == "error" for _, result in results)
    if as_json:
        emit({"ok": not errors, "checks": [{"name": name, **result._asdict()} for name, result in results]})
    elif errors:
        click.echo(f"{errors} of {len(results)} checks found an error")
    if errors:
        raise click.exceptions.Exit(1)


def _specs(file: Path | None, base: str | None, port: int | None) -> tuple[ServeSpec, tuple[ServeSpec, ...]]:
    """Returns the base that is examined, and those beside it. SpecError where there are several and `base` is none."""
    fields = {} if file is None else read_mapping(file)
    given = {name: value for name, value in (("base", base), ("port", port)) if value is not None}
    fleet = FleetSpec.parse(fields, source=str(file))
    if len(fleet.bases) == 1:
        chosen = fleet.bases[0].model_dump(exclude_unset=True) | given
        return ServeSpec.parse(chosen, source="the command line"), ()
    for spec in fleet.bases:
        if spec.base == base:
            others = tuple(other for other in fleet.bases if other is not spec)
            return spec if port is None else spec.model_copy(update={"port": port}), others
    names = ", ".join(fleet.names)
    raise SpecError(f"{file} has several bases ({names}); say which one to examine, as in --base {fleet.names[0]}")
