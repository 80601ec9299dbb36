"""Checks of the machine: Python, packages, memory, disk, open files. All but the base's size is in the facts."""

from __future__ import annotations

import shlex
from importlib.metadata import PackageNotFoundError, metadata

from loray.bases.checkpoint import tensor_infos
from loray.bases.registry import get_base
from loray.cli.doctor.facts import needed
from loray.cli.doctor.finding import Finding, Situation, error, ok, warning
from loray.errors import LorayError
from loray.local.cluster import OBJECT_STORE_BYTES, current_cluster
from loray.local.standalone import standalone_servers
from loray.spec import ServeSpec, format_size

OLDEST_PYTHON = ">=3.11"  # where loray is not installed; else its metadata says it
_LEAST_DISK = 1 << 30
_LOW_DISK = 0.05  # share of the disk
_OTHER_FILES = 256  # libraries, adapters, logs, connections between processes


def python(s: Situation) -> Finding:
    from packaging.specifiers import SpecifierSet

    try:
        wanted = metadata("loray")["Requires-Python"]
    except PackageNotFoundError:
        wanted = OLDEST_PYTHON
    if SpecifierSet(wanted).contains(s.facts.python, prereleases=True):
        return ok(f"Python {s.facts.python}")
    return error(
        f"Python {s.facts.python} does not run loray, which needs {wanted}",
        "python3.12 -m venv .venv && .venv/bin/pip install loray",
    )


def packages(s: Situation) -> Finding:
    from packaging.specifiers import SpecifierSet

    if s.facts.requirements is None:
        return error("loray is not installed, so train, serve and up are missing", "pip install -e .")
    wrong, install = [], []
    for name, specifier in needed(s.facts.requirements):
        found = s.facts.installed.get(name)
        if found is None:
            wrong.append(f"{name} is missing")
        elif not SpecifierSet(specifier).contains(found, prereleases=True):
            wrong.append(f"{name} {found} is not {specifier}")
        else:
            continue
        install.append(name + specifier)
    if wrong:
        return error("; ".join(wrong), f"pip install {shlex.join(install)}")
    return ok(f"{len(s.facts.installed)} packages have versions that fit")


def memory(s: Situation) -> Finding:
    """Of all bases on the CPU together; what mends it is told of the one that is examined."""
    spec, home = s.spec, s.settings.home
    if not spec.device.startswith("cpu"):
        if spec.pool_bytes is None:
            share = f"{spec.gpu_memory_utilization:.0%} of its memory"
            return ok(f"weights are on {spec.device}; the pool has what they and the steps leave of {share}")
        return ok(f"weights and a pool of {format_size(spec.pool_bytes)} are on {spec.device}")
    if standalone_servers(home) or current_cluster(home):
        return ok("what is served has its memory")
    bases = [(b, _num_replicas(b), _weights(s, b.base)) for b in (spec, *s.others) if b.device.startswith("cpu")]
    least = sum(num * (weights + _pool(b)) for b, num, weights in bases)
    most = least + sum(num * b.host_bytes for b, num, _ in bases)
    told = f"{format_size(s.facts.available)} of memory are available"
    if s.facts.available < least:
        what = " + ".join(
            f"{num} × (weights {format_size(weights)} + pool {format_size(_pool(b))}{_of(b.base, s)})"
            for b, num, weights in bases
        )
        _, num, weights = bases[0]
        beside = least - num * (weights + _pool(spec))
        fitting = max(16, ((s.facts.available - beside) // num - weights) // 2 >> 20)
        return error(f"{told}, and {format_size(least)} are needed: {what}", _with(s, "pool_bytes", f"{fitting}MiB"))
    if s.facts.available < most:
        return warning(
            f"{told}; with host_bytes full, {format_size(most)} are needed",
            _with(s, "host_bytes", f"{(s.facts.available - least) >> 21}MiB"),
        )
    return ok(f"{told}, {format_size(most)} needed at most")


def _with(s: Situation, field: str, value: str) -> str:
    """What gives the examined base another value, and leaves the rest of its deployment."""
    if s.file is not None:
        return f"set {field} of {s.spec.base} in {s.file} to {value}"
    return f"loray up --base {s.spec.base} --{field.replace('_', '-')} {value}"


def _of(base: str, s: Situation) -> str:
    return f" of {base}" if s.others else ""


def _pool(spec: ServeSpec) -> int:
    """Bytes, of a base on the CPU."""
    return spec.fixed_pool_bytes or 0


def _num_replicas(spec: ServeSpec) -> int:
    return max(1, spec.min_replicas)


def shared_memory(s: Situation) -> Finding:
    if s.facts.shm is not None and (s.facts.shm >= OBJECT_STORE_BYTES or current_cluster(s.settings.home)):
        return ok(f"/dev/shm has {format_size(s.facts.shm)} free")
    free = "is missing" if s.facts.shm is None else f"has {format_size(s.facts.shm)} free"
    return warning(
        f"/dev/shm {free}, and Ray's object store takes {format_size(OBJECT_STORE_BYTES)}: it will be on disk, slower",
        "mount -o remount,size=1G /dev/shm  (in a container: docker run --shm-size=1g)",
    )


def disk(s: Situation) -> Finding:
    free, total = s.facts.disk_free, s.facts.disk_total
    told = f"the disk of {s.settings.home} has {format_size(free)} of {format_size(total)} free"
    mend = "loray store gc --yes  (or point LORAY_HOME at a larger disk)"
    if free < _LEAST_DISK:
        return error(told, mend)
    return warning(told, mend) if free < _LOW_DISK * total else ok(told)


def open_files(s: Situation) -> Finding:
    """A request has a connection to its client, and a queued one too."""
    least = _OTHER_FILES + sum(b.max_queued + b.max_num_seqs * b.max_replicas for b in (s.spec, *s.others))
    limit = s.facts.max_open_files
    if limit >= least:
        return ok(f"{limit:,} open files are allowed")
    if s.facts.hard_open_files >= least:
        mend = f"ulimit -n {least}"
    else:
        mend = f"echo '* - nofile {least}' | sudo tee -a /etc/security/limits.conf  (and log in again)"
    return error(f"{limit:,} open files are allowed, and {least:,} may be needed: a connection for each request", mend)


def _weights(s: Situation, name: str) -> int:
    """Bytes of a base; 0 where it is missing, which another check says."""
    try:
        base = get_base(s.settings.home, name)
        return sum(info.stop - info.start for info in tensor_infos(base.path))
    except (LorayError, OSError, ValueError):
        return 0
