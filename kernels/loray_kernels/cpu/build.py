"""Compiles csrc/*.cpp into shared libraries with the machine's C++ compiler, and caches them.

The sources are plain C functions without torch's headers, so compiling takes seconds, not minutes. A library's name has
the hash of its sources and flags and the hash of the compiler, so an outdated library is never loaded. Without a
compiler, a cached library that any compiler made of the same sources is used (an image may have no compiler).
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from loray_kernels.compiled import BackendUnavailable, cache_folder

SOURCES = Path(__file__).parent / "csrc"
# No contraction and no fast math: values are rounded only where the sources say.
_FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno"),
    *("-fno-exceptions", "-fno-rtti", "-fvisibility=hidden"),
)


def library(name: str, sources: Sequence[str], flags: Sequence[str] = ()) -> Path:
    """The shared library of `sources` (files of csrc), compiled unless it is in the cache.

    Several processes may call this at once: one compiles, the others wait for it.
    """
    compiler = _compiler()
    folder = cache_folder()
    texts = [p.read_bytes() for p in sorted(SOURCES.rglob("*")) if p.is_file()]
    stem = f"{name}-{_hash(*texts, *sources, *_FLAGS, *flags)}"
    if compiler is None:
        for found in sorted(folder.glob(f"{stem}-*.so")):
            return found
        raise BackendUnavailable(
            "the cpu kernels need a C++ compiler: install g++ (Debian: apt-get install g++) or set CXX to one"
        )
    path = folder / f"{stem}-{_hash(_version(compiler))}.so"
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{path.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.exists():
                _compile(compiler, [SOURCES / s for s in sources], [*_FLAGS, *flags], path)
    except OSError as e:
        raise BackendUnavailable(
            f"the cpu kernels cannot be kept in {folder}: {e}; set XDG_CACHE_HOME to a folder that can be written"
        ) from e
    return path


def _compiler() -> str | None:
    """$CXX, else g++ or another on the path."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and (found := shutil.which(name)):
            return found
    return None


def _version(compiler: str) -> str:
    done = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return f"{compiler} {done.stdout}"


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256(platform.machine().encode())
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()[:16]


def _compile(compiler: str, sources: Sequence[Path], flags: Sequence[str], path: Path) -> None:
    """Compile each file by itself, as many at once as there are cores; the library is written atomically."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        objects = [str(Path(folder) / f"{s.stem}.o") for s in sources]
        commands = [[compiler, *flags, "-c", str(s), "-o", o] for s, o in zip(sources, objects, strict=True)]
        with ThreadPoolExecutor(os.cpu_count() or 1) as threads:
            list(threads.map(_run, commands))
        whole = Path(folder) / path.name
        _run([compiler, "-shared", "-fopenmp", *objects, "-o", str(whole)])
        whole.replace(path)


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        first = "\n".join(done.stderr.splitlines()[:10])
        raise BackendUnavailable(f"{command[0]} cannot compile the cpu kernels; install g++ 12 or newer:\n{first}")
