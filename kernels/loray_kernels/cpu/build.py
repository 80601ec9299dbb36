"""The C++ library: compiled for each instruction set, chosen for this CPU, and loaded.

The sources are plain C functions without torch's headers, so compiling takes seconds, not minutes. A library's name has
the hash of its sources and flags and the hash of the compiler, so an outdated library is never loaded. Without a
compiler, a cached library that any compiler made of the same sources is used (an image may have no compiler).
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from loray_kernels.compiled import BackendUnavailable, cache_folder

SOURCES = Path(__file__).parent / "csrc"
# Those that take longest come first.
_SOURCES = (
    *("attention.cpp", "quantized.cpp", "plain.cpp", "causal.cpp", "linear.cpp", "lora.cpp", "vera.cpp", "layer.cpp"),
    *("rows.cpp", "experts.cpp", "sample.cpp"),
)
# No contraction and no fast math: values are rounded only where the sources say.
_FLAGS = (
    *("-O3", "-std=c++17", "-fPIC", "-fopenmp", "-ffp-contract=off", "-fno-math-errno"),
    *("-fno-exceptions", "-fno-rtti", "-fvisibility=hidden"),
)
# From slow to fast, with the compiler's flags; host.cpp knows them by their index.
_AVX2 = ("-mavx2", "-mfma")
_AVX512 = (
    *_AVX2,
    *(f"-mavx512{f}" for f in ("f", "bw", "vl", "dq", "bf16", "vnni")),
    "-mprefer-vector-width=512",
)
ISA_FLAGS = {
    "generic": (),
    "avx2": _AVX2,
    "avxvnni": (*_AVX2, "-mavxvnni"),  # products of bytes: newer CPUs without AVX-512 have them
    "avx512": _AVX512,
    "amx": (*_AVX512, "-mamx-tile", "-mamx-bf16"),
}
# Where torch is held to a slower one by its own variable, so are these kernels.
_HELD_TO = {"default": "generic", "avx2": "avx2", "avx512": "avx512"}
_SUFFIX = {torch.bfloat16: "bf16", torch.float32: "fp32"}


def library(name: str, sources: Sequence[str], flags: Sequence[str] = ()) -> Path:
    """Find the shared library of `sources` (files of csrc), which is compiled unless it is in the cache.

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


_P, _I, _F, _N = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "pack_linear": (_P, _I, _I, _P, _N),
    "linear": (_P, _I, _I, _P, _P, _N),
    "logits": (_P, _I, _I, _P, _P, _N),
    "layers": (_P, _P, _P, _I, _P, _I, _I, _N),
    "silu_mul": (_P, _I, _I, _I, _P, _N),
    "gelu_mul": (_P, _I, _I, _I, _P, _N),
    "clamped_mul": (_P, _I, _I, _I, _F, _P, _N),
    "choose_experts": (_P, _I, _I, _I, _I, _P, _P, _N),
    "experts": (_P, _I, _P, _P, _N),
    "lora_shrink": (_P, _I, _P, _P, _P, _I, _P, _N),
    "lora_expand": (_P, _P, _P, _I, _P, _N),
    "vera_shrink": (_P, _I, _I, _P, _P, _N),
    "vera_expand": (_P, _I, _P, _I, _I, _P, _P, _P, _P, _N),
    "paged_attention": (_P, _I, _P, _I, _P, _P, _I, _P, _F, _I, _F, _P, _N),
    "rms_norm": (_P, _I, _I, _I, _I, _P, _F, _F, _P, _P, _P, _I, _P, _N),
    "scale_rows": (_P, _I, _I, _P, _P, _P, _I, _P, _N),
    "turn_rows": (_P, _I, _I, _P, _P, _I, _P, _P, _P, _N),
    "rope": (_P, _I, _I, _I, _I, _I, _P, _P, _P, _N),
    "write_kv": (_P, _P, _P, _I, _P, _I, _P, _I, _N),
}


@cache
def supported() -> tuple[str, ...]:
    """List the instruction sets that this CPU has, from slow to fast, up to that of ATEN_CPU_CAPABILITY.

    BackendUnavailable if there is no library.
    """
    host = _host()
    known = list(ISA_FLAGS)
    last = known.index(_HELD_TO.get(os.environ.get("ATEN_CPU_CAPABILITY", ""), known[-1]))
    return tuple(isa for i, isa in enumerate(known) if i <= last and host.loray_supports(i))


def release_threads() -> None:
    """End the OpenMP threads of the calling thread; its next parallel region makes new ones.

    If OpenMP has more threads than there are cores, all of them wait by system calls instead of spinning, and a step of
    a few hundred short regions takes half as long again. So the thread that builds a model calls this before another
    thread runs it.
    """
    with suppress(BackendUnavailable):
        _host().loray_release_threads()


@cache
def _host() -> ctypes.PyDLL:
    return _load("host", ("host.cpp",), ())


@cache
def functions(isa: str) -> dict[torch.dtype, SimpleNamespace]:
    """Give the kernels by dtype, as attributes by name; they are compiled at first use. Their arguments are in csrc.

    BackendUnavailable says why there is no library; ValueError if the CPU lacks `isa`.
    """
    loaded, beside = _library(isa), _beside_python(isa)
    return {
        dtype: SimpleNamespace(
            **{
                name: _function(beside if name == "layers" else loaded, f"{name}_{suffix}_{isa}", signature)
                for name, signature in _SIGNATURES.items()
            }
        )
        for dtype, suffix in _SUFFIX.items()
    }


def _function(library: ctypes.CDLL, name: str, signature: tuple[Any, ...]) -> Any:
    function = library[name]
    function.argtypes, function.restype = signature, None
    return function


@cache
def _library(isa: str) -> ctypes.PyDLL:
    if isa not in supported():
        raise ValueError(f"no instruction set {isa!r} here; there is: {', '.join(supported())}")
    return _load(isa, _SOURCES, (f"-DLORAY_ISA={isa}", *ISA_FLAGS[isa]))


def _load(name: str, sources: tuple[str, ...], flags: tuple[str, ...]) -> ctypes.PyDLL:
    # torch is imported above: this finds torch's OpenMP library already loaded, so both share their threads.
    path = library(name, sources, flags)
    try:
        # A call keeps Python's lock: its threads use all cores, and Python code of other threads would only delay them.
        return ctypes.PyDLL(str(path))
    except OSError as e:
        raise BackendUnavailable(f"the cpu kernels do not load: {e}; delete {path} to have it made anew") from e


def _beside_python(isa: str) -> ctypes.CDLL:
    """The library for calls that take long: they release Python's lock."""
    return ctypes.CDLL(_library(isa)._name)


@cache
def sample_function(isa: str) -> Any:
    """csrc/sample.cpp; its logits are fp32 whatever the model's dtype is."""
    return _function(_library(isa), f"sample_{isa}", (_P, _I, _I, _P, _I, _P, _I, _P, _P, _N))


@cache
def causal_functions(isa: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """csrc/causal.cpp: forward and backward."""
    library, shape = _beside_python(isa), (_I, _I, _I, _I, _F, _N)
    forward, backward = (
        _function(library, f"causal_{way}_{_SUFFIX[dtype]}_{isa}", (*[_P] * num, *shape))
        for way, num in (("forward", 5), ("backward", 10))
    )
    return forward, backward


@cache
def packed_size(isa: str, in_features: int, out_features: int, itemsize: int) -> int:
    """Count the elements of a packed matrix."""
    size = ctypes.c_int64()
    function = _function(_library(isa), f"packed_size_{isa}", (_I, _I, _I, _P))
    function(in_features, out_features, itemsize, ctypes.addressof(size))
    return size.value


@cache
def packed_bytes(isa: str, in_features: int, out_features: int, bits: int, group: int) -> int:
    """Count the bytes of a packed matrix of integers."""
    size = ctypes.c_int64()
    function = _function(_library(isa), f"packed_bytes_{isa}", (_I, _I, _I, _I, _P))
    function(in_features, out_features, bits, group, ctypes.addressof(size))
    return size.value


@cache
def pack_integers(isa: str) -> Any:
    """csrc/linear.cpp: packs a matrix of integers, whatever the activations' dtype is."""
    return _function(_library(isa), f"pack_integers_{isa}", (_P, _P, _P, _I, _I, _I, _I, _P, _N))
