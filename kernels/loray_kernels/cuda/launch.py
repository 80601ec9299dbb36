"""The CUDA C++ kernels: compiled by NVRTC, launched by CuPy.

NVRTC is a shared library, of the wheel nvidia-cuda-nvrtc (which torch's CUDA build requires) or of a toolkit. Tests use
another Launcher, which runs the same kernels on the CPU.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import importlib.util
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from loray_kernels.compiled import BackendUnavailable, cache_folder

SOURCES = Path(__file__).parent / "csrc"
FILES = ("attention.cu", "choose.cu", "lora.cu", "rows.cu", "sample.cu", "vera.cu")
SUFFIX = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_OPTIONS = ("--std=c++17", "--ptxas-options=-v", f"--include-path={SOURCES}")
_DRIVERS = {12: "525", 13: "580"}  # the oldest that run what a major version of CUDA has compiled

Argument = int | np.float32


class Compiled(NamedTuple):
    """Machine code, and the compiler's log with each kernel's registers, shared memory and spills."""

    cubin: bytes
    log: str


def compile_source(name: str, arch: str) -> Compiled:
    """Compile a source for `arch`, such as "sm_90". BackendUnavailable without NVRTC, or with its errors."""
    nvrtc = _library()
    program = ctypes.c_void_p()
    source = (SOURCES / name).read_bytes()
    _check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, name.encode(), 0, None, None), name)
    try:
        options = [option.encode() for option in (*_OPTIONS, f"--gpu-architecture={arch}")]
        status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
        log = _read(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program).rstrip(b"\0").decode()
        if status:
            raise BackendUnavailable(f"NVRTC cannot compile {name} for {arch}:\n{log}")
        return Compiled(_read(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program), log)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def cubin(name: str, arch: str) -> Path:
    """The file with a source's machine code in the user's cache folder, compiled unless it is there.

    BackendUnavailable as from `compile_source`, or where the folder cannot be written to.
    """
    digest = hashlib.sha256(f"{version()} {arch} {_OPTIONS}".encode())
    for path in (*sorted(SOURCES.glob("*.cuh")), SOURCES / name):
        digest.update(path.read_bytes())
    path = cache_folder() / f"{Path(name).stem}-{arch}-{digest.hexdigest()[:16]}.cubin"
    try:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = path.with_suffix(f".{os.getpid()}")
            whole.write_bytes(compile_source(name, arch).cubin)
            whole.replace(path)
    except OSError as e:
        raise BackendUnavailable(
            f"the cuda kernels cannot be kept in {path.parent}: {e}; set XDG_CACHE_HOME to a folder that can be written"
        ) from e
    return path


def version() -> tuple[int, int]:
    """Ask for NVRTC's version. BackendUnavailable without NVRTC."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "its version")
    return major.value, minor.value


@cache
def _library() -> ctypes.CDLL:
    tried = [*_wheels(), ctypes.util.find_library("nvrtc")]
    for name in filter(None, tried):
        try:
            return ctypes.CDLL(str(name))
        except OSError:
            continue
    raise BackendUnavailable("the cuda kernels need NVRTC: pip install nvidia-cuda-nvrtc, or install the CUDA toolkit")


def _wheels() -> list[Path]:
    """The NVRTC libraries of NVIDIA's wheels, which are below the namespace package `nvidia`. That of torch's CUDA
    comes first, whose machine code a driver that runs torch can load; then the newest.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec is not None else None
    found = [p for folder in folders or () for p in Path(folder).glob("*/lib/libnvrtc.so.*")]
    own = int((torch.version.cuda or "0").partition(".")[0])
    return sorted(found, key=lambda path: ((major := _major(path)) == own, major), reverse=True)


def _major(library: Path) -> int:
    return int(library.name.removeprefix("libnvrtc.so.").partition(".")[0])


def _read(get_size: ctypes._NamedFuncPointer, get: ctypes._NamedFuncPointer, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(get_size(program, ctypes.byref(size)), "a result's size")
    buffer = ctypes.create_string_buffer(size.value)
    _check(get(program, buffer), "a result")
    return buffer.raw


def _check(status: int, what: str) -> None:
    if status:
        raise BackendUnavailable(f"NVRTC failed with status {status} at {what}")


class Launcher(Protocol):
    def __call__(self, kernel: str, grid: tuple[int, int, int], threads: int, arguments: Sequence[Argument]) -> None:
        """Queue a kernel. Integers and addresses are 64 bits wide. The caller keeps alive what addresses point to."""
        ...


class _Stream(NamedTuple):
    ptr: int


class CupyLauncher:
    """Launches on one device. BackendUnavailable without CuPy or NVRTC, or with a driver too old for one of them."""

    def __init__(self, device: torch.device) -> None:
        try:
            import cupy
        except ImportError as e:
            extra = "cuda12" if (torch.version.cuda or "").startswith("12.") else "cuda13"
            raise BackendUnavailable(f"the cuda kernels need CuPy: pip install 'loray[{extra}]' ({e})") from e
        self._device = torch.cuda.current_device() if device.index is None else device.index
        major, minor = torch.cuda.get_device_capability(self._device)
        self._kernels: dict[str, Any] = {}
        cubins = {name: str(cubin(name, f"sm_{major}{minor}")) for name in FILES}
        try:
            with cupy.cuda.Device(self._device):
                self._modules = {name: cupy.RawModule(path=path) for name, path in cubins.items()}
        except RuntimeError as e:  # of CUDA's runtime or driver
            raise BackendUnavailable(f"CuPy cannot use the driver, which may be too old for it; update it: {e}") from e
        cuda, _ = version()
        try:
            with cupy.cuda.Device(self._device):
                for module in self._modules.values():
                    module.compile()  # loads it, which its first kernel would do else
        except RuntimeError as e:
            raise BackendUnavailable(
                f"the driver cannot load kernels that CUDA {cuda} has compiled, which needs driver "
                f"{_DRIVERS.get(cuda, f'for CUDA {cuda}')} or later: update it, or install torch and loray's extra for "
                f"an older CUDA, such as 'loray[cuda12]' ({e})"
            ) from e

    def __call__(self, kernel: str, grid: tuple[int, int, int], threads: int, arguments: Sequence[Argument]) -> None:
        function = self._kernels.get(kernel)
        if function is None:
            function = self._kernels[kernel] = self._modules[file_of(kernel)].get_function(kernel)
        stream = _Stream(torch.cuda.current_stream(self._device).cuda_stream)
        function(grid, (threads, 1, 1), tuple(arguments), stream=stream)


def file_of(kernel: str) -> str:
    """Find the source of a kernel: it is named by the kernel's first word, or is rows.cu."""
    name = f"{kernel.partition('_')[0]}.cu"
    return name if name in FILES else "rows.cu"
