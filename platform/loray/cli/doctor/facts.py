"""Facts of this machine that checks judge: versions, memory, disk, limits. Read at once, so that a check is pure."""

from __future__ import annotations

import resource
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

_SHM = Path("/dev/shm")
_CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Facts:
    """Sizes in bytes.

    python        version
    requirements  PEP 508 lines of the installed loray; None where it is not installed
    installed     version by distribution, None where it is missing
    available     memory that processes can still get: the machine's, within the container's limit
    shm           free bytes of /dev/shm; None where there is none
    disk_free, disk_total  of the file system of LORAY_HOME
    max_open_files  the soft limit; hard_open_files: up to which it can be raised
    """

    python: str
    requirements: tuple[str, ...] | None
    installed: Mapping[str, str | None]
    available: int
    shm: int | None
    disk_free: int
    disk_total: int
    max_open_files: int
    hard_open_files: int

    @classmethod
    def read(cls, home: Path) -> Facts:
        import psutil

        requirements = _requirements()
        available = psutil.virtual_memory().available
        limit = _left_in_container(_CGROUP)
        disk = shutil.disk_usage(existing(home))
        soft, hard = (
            sys.maxsize if n == resource.RLIM_INFINITY else n for n in resource.getrlimit(resource.RLIMIT_NOFILE)
        )
        return cls(
            python=".".join(map(str, sys.version_info[:3])),
            requirements=requirements,
            installed=_installed(requirements or ()),
            available=available if limit is None else min(available, limit),
            shm=shutil.disk_usage(_SHM).free if _SHM.is_dir() else None,
            disk_free=disk.free,
            disk_total=disk.total,
            max_open_files=soft,
            hard_open_files=hard,
        )


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.parents) if p.exists())


def needed(lines: tuple[str, ...]) -> list[tuple[str, str]]:
    """(name, versions) of the requirements that hold on this machine without extras."""
    from packaging.requirements import Requirement

    found = map(Requirement, lines)
    return [(r.name, str(r.specifier)) for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]


def _requirements() -> tuple[str, ...] | None:
    try:
        return tuple(requires("loray") or ())
    except PackageNotFoundError:
        return None


def _installed(requirements: tuple[str, ...]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for name, _ in needed(requirements):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def _left_in_container(folder: Path) -> int | None:
    """Bytes below the limit of this control group (version 2); None where there is no limit."""
    try:
        limit = (folder / "memory.max").read_text(encoding="utf-8").strip()
        used = int((folder / "memory.current").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return None if limit == "max" else max(0, int(limit) - used)
