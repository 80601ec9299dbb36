"""A launcher that runs cuda/csrc on the CPU: the same sources, compiled with shim.h in place of CUDA."""

from __future__ import annotations

import ctypes
import hashlib
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from loray_kernels import BackendUnavailable
from loray_kernels.compiled import cache_folder
from loray_kernels.cuda.launch import FILES, SOURCES, Argument, file_of

_SHIM = Path(__file__).parent / "shim.h"
# Fortified longjmp takes a switch between two stacks for an error.
_FLAGS = ("-std=c++20", "-O2", "-shared", "-fPIC", "-w", "-DLORAY_SHIM", "-U_FORTIFY_SOURCE", "-ffp-contract=off")


class ShimLauncher:
    """BackendUnavailable without a compiler; AssertionError if the threads of a block wait for each other.

    The shim runs one kernel at a time, whichever thread launches it.
    """

    _lock = threading.Lock()

    def __init__(self) -> None:
        self._libraries = _libraries()

    def __call__(self, kernel: str, grid: tuple[int, int, int], threads: int, arguments: Sequence[Argument]) -> None:
        values = [ctypes.c_int64(a) if isinstance(a, int) else ctypes.c_float(float(a)) for a in arguments]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        with self._lock:
            stuck = self._libraries[file_of(kernel)][f"launch_{kernel}"]((ctypes.c_uint * 3)(*grid), threads, pointers)
        assert not stuck, f"{kernel}: a barrier that not every thread reaches"


class NotingLauncher:
    """A ShimLauncher that remembers which kernels it has launched."""

    def __init__(self) -> None:
        self._launcher, self.kernels = ShimLauncher(), list[str]()

    def __call__(self, kernel: str, grid: tuple[int, int, int], threads: int, arguments: Sequence[Argument]) -> None:
        self.kernels.append(kernel)
        self._launcher(kernel, grid, threads, arguments)


def pointers(kernel: str, arguments: Sequence[Argument]) -> list[tuple[str, int]]:
    """(name, address) of the arguments that are addresses, without null."""
    parameters = _parameters(kernel)
    assert len(parameters) == len(arguments), f"{kernel} takes {len(parameters)} arguments, {len(arguments)} are given"
    found = zip(parameters, arguments, strict=True)
    return [(name.lstrip("*"), int(a)) for name, a in found if name.startswith("*") and a]


@cache
def _parameters(kernel: str) -> list[str]:
    """Names, with a star before those of addresses."""
    source = (SOURCES / file_of(kernel)).read_text().replace("\\\n", " ")
    name = re.sub("_(bf16|fp16|fp32)$", "", kernel)
    name = re.sub(r"(\d+)$", r"(?:\1|##D##)", name) + r"(?:_##suffix|_fp32)"
    found = re.search(rf"__global__\s+void\s+__launch_bounds__\([^)]*\)\s+{name}\(([^)]*)\)", source)
    assert found is not None, f"{kernel} has no signature in {file_of(kernel)}"
    return [parameter.split()[-1] for parameter in found[1].split(",")]


def compile_shim(source: Path, library: Path) -> subprocess.Popen[bytes]:
    """Start the compiler. BackendUnavailable if there is none."""
    command = [os.environ.get("CXX", "g++"), *_FLAGS, f"-I{_SHIM.parent}", "-x", "c++", str(source), "-o", str(library)]
    try:
        return subprocess.Popen(command)
    except FileNotFoundError as e:
        raise BackendUnavailable(f"the CUDA sources need a C++ compiler to run on the CPU: {e}") from e


@cache
def _libraries() -> dict[str, Any]:
    folder = cache_folder() / "tests"
    folder.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for path in (_SHIM, *sorted(SOURCES.iterdir())):
        digest.update(path.read_bytes())
    paths = {name: folder / f"{name}-{digest.hexdigest()[:16]}.so" for name in FILES}
    with tempfile.TemporaryDirectory(dir=folder) as made:
        missing = [name for name, path in paths.items() if not path.exists()]
        started = {name: compile_shim(SOURCES / name, Path(made, name)) for name in missing}
        for name, process in started.items():
            assert process.wait() == 0, f"{name} does not compile under the shim"
            Path(made, name).replace(paths[name])
    return {name: ctypes.CDLL(str(path)) for name, path in paths.items()}
