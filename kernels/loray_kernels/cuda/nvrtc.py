"""Compiles cuda/csrc/*.cu to machine code with NVRTC. Needs no GPU, no toolkit and no headers.

NVRTC is a shared library, of the wheel nvidia-cuda-nvrtc (which torch's CUDA build requires) or of a toolkit.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import hashlib
import importlib.util
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from loray_kernels.compiled import BackendUnavailable, cache_folder

SOURCES = Path(__file__).parent / "csrc"
FILES = ("attention.cu", "choose.cu", "lora.cu", "rows.cu", "sample.cu", "vera.cu")
_OPTIONS = ("--std=c++17", "--ptxas-options=-v", f"--include-path={SOURCES}")


class Compiled(NamedTuple):
    """Machine code, and the compiler's log with each kernel's registers, shared memory and spills."""

    cubin: bytes
    log: str


def compile_source(name: str, arch: str) -> Compiled:
    """`arch` like "sm_90". BackendUnavailable without NVRTC, or with its errors in the source."""
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
    """NVRTC's version. BackendUnavailable without NVRTC."""
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
    """NVIDIA's wheels have their libraries below the namespace package `nvidia`. Of several, that of torch's CUDA comes
    first, whose machine code a driver that runs torch can load; then the newest.
    """
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec is not None else None
    found = [p for folder in folders or () for p in Path(folder).glob("*/lib/libnvrtc.so.*")]
    own = int((torch.version.cuda or "0").partition(".")[0])
    return sorted(found, key=lambda path: ((major := _major(path)) == own, major), reverse=True)


def _major(library: Path) -> int:
    """Of libnvrtc.so.13 it is 13."""
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
