"""This machine: its processors, memory and GPUs, how fast they are, and the dtypes that fit them.

`hardware()` reads what the system says, in milliseconds and without torch. `Rates` are measured once for each machine,
by `loray.train.rates` in a process of its own, and cached in LORAY_HOME under the hardware that they belong to.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from loray.spec import DType, format_size

_VERSION = 4  # of what is measured: rates of another one are measured again
_CPU_INFO = Path("/proc/cpuinfo")
_CGROUP = Path("/sys/fs/cgroup")
_MEMORY_INFO = Path("/proc/meminfo")
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader,nounits")
_NVIDIA_TIMEOUT_S = 10.0
_AMPERE = (8, 0)  # the first GPUs that multiply bfloat16
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # of x86-64, and of ARM
# Flags of /proc/cpuinfo, from the widest instruction set to the narrowest, with the names that people know.
_INSTRUCTION_SETS = (
    ("amx_bf16", "AMX"),
    ("avx512_bf16", "AVX-512 with bfloat16"),
    ("avx512f", "AVX-512"),
    ("avx2", "AVX2"),
    ("sve", "SVE"),
    ("asimd", "NEON"),
)
# Limits of oneDNN (ONEDNN_MAX_CPU_ISA), which multiplies for torch, below which it has no bfloat16 products.
_WITHOUT_BFLOAT16 = frozenset({"SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI"})


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU. `capability`: CUDA's, such as (9, 0) of an H100."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]

    @property
    def multiplies_bfloat16(self) -> bool:
        return self.capability >= _AMPERE


@dataclass(frozen=True, slots=True)
class Hardware:
    """The hardware of a machine. `memory_bytes` and `num_cores` are those that this process may use.

    multiplies_bfloat16  the CPU has instructions for bfloat16 products; else they take several times those of float32
    """

    cpu: str
    instruction_set: str
    multiplies_bfloat16: bool
    num_cores: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()

    def describe(self) -> str:
        """Return one line for people."""
        cores = f"{self.num_cores} core{'s' if self.num_cores > 1 else ''}"
        text = f"{self.cpu} ({self.instruction_set}), {cores}, {format_size(self.memory_bytes)} of memory"
        names = [gpu.name for gpu in self.gpus]
        memory = {gpu.name: gpu.memory_bytes for gpu in reversed(self.gpus)}  # of the first of each name
        kinds = [f"{names.count(n)} × {n} ({format_size(memory[n])})" for n in dict.fromkeys(names)]
        return ", ".join([text, *kinds])


@dataclass(frozen=True, slots=True)
class GpuRates:
    """Measured rates of one GPU: FLOP/s of products in its fastest dtype, bytes/s of its memory."""

    flops: float
    bandwidth: float


@dataclass(frozen=True, slots=True)
class Rates:
    """Measured rates of a machine: FLOP/s of matrix products by dtype, FLOP/s of S2-Attn and of dense attention while
    training, both in the dtype that trains faster, and bytes/s read from memory; all cores together. `gpu`: those of
    the first GPU, None where there is none.
    """

    products: Mapping[DType, float]
    attention_flops: float
    dense_attention_flops: float
    bandwidth: float
    gpu: GpuRates | None = None

    @classmethod
    def from_json(cls, found: Mapping[str, object]) -> Rates:
        """Raises TypeError where `found` is not what `asdict` gives."""
        gpu = found.get("gpu")
        if gpu is not None and not isinstance(gpu, Mapping):
            raise TypeError("gpu is no mapping")
        return cls(**{**found, "gpu": None if gpu is None else GpuRates(**gpu)})  # type: ignore[arg-type]

    @property
    def fastest(self) -> float:
        """Return the FLOP/s of products in the fastest dtype."""
        return max(self.products.values())


class Machine(NamedTuple):
    """Hardware and its rates; None: they have not been measured."""

    hardware: Hardware
    rates: Rates | None = None

    @classmethod
    def here(cls, home: Path) -> Machine:
        """Return this machine, with the rates that are cached in `home`."""
        found = hardware()
        return cls(found, _cached(home, found))

    def cache(self, home: Path) -> None:
        """Write the rates below `home`, in one step, so that no reader sees a part of them. Raises OSError."""
        assert self.rates is not None
        path = _path(home, self.hardware)
        home.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        written = {"version": _VERSION, "hardware": asdict(self.hardware), "rates": asdict(self.rates)}
        temporary.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
        temporary.replace(path)


class ChosenDType(NamedTuple):
    """A dtype, and why it fits: the end of a sentence that begins with the dtype."""

    dtype: DType
    why: str


def training_dtype(hardware: Hardware, *, use_gpu: bool) -> ChosenDType:
    """Return the dtype in which training and evaluation are fast there: bfloat16 where it is multiplied in hardware,
    else float32. Float16 would need loss scaling.
    """
    if not use_gpu:
        return _of_cpu(hardware)
    if not hardware.gpus:
        return ChosenDType("bfloat16", "GPUs since Ampere multiply it in hardware")
    return _of_gpu(min(hardware.gpus, key=lambda gpu: gpu.capability), "float32")


def serving_dtype(hardware: Hardware, *, use_gpu: bool, has_kernels: bool) -> ChosenDType:
    """Return the dtype of weights and KV cache in which serving is fast there.

    `has_kernels`: this project's compiled CPU kernels run, which read bfloat16 and multiply float32 where the CPU does
    not multiply bfloat16. Decoding reads every weight for each step, so half of the bytes is the faster way.
    """
    if use_gpu:
        gpu = min(hardware.gpus, key=lambda gpu: gpu.capability, default=Gpu("this GPU", 0, _AMPERE))
        return _of_gpu(gpu, "float16")
    if hardware.multiplies_bfloat16 or not has_kernels:
        return _of_cpu(hardware)
    return ChosenDType("bfloat16", "half the bytes to read; the kernels multiply it as float32")


def _of_cpu(hardware: Hardware) -> ChosenDType:
    if hardware.multiplies_bfloat16:
        return ChosenDType("bfloat16", f"this CPU multiplies it in hardware ({hardware.instruction_set})")
    return ChosenDType("float32", f"this CPU has no bfloat16 products ({hardware.instruction_set})")


def _of_gpu(gpu: Gpu, otherwise: DType) -> ChosenDType:
    if gpu.multiplies_bfloat16:
        return ChosenDType("bfloat16", f"{gpu.name} multiplies it in hardware")
    return ChosenDType(otherwise, f"{gpu.name} has no bfloat16 products")


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware() -> Hardware:
    """Read this machine's hardware. What the system does not say is left out."""
    cpu, flags = _cpu()
    known = [name for flag, name in _INSTRUCTION_SETS if flag in flags]
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper()
    is_limited = limit in _WITHOUT_BFLOAT16
    return Hardware(
        cpu=cpu,
        instruction_set=f"limited to {limit}" if is_limited else known[0] if known else platform.machine(),
        multiplies_bfloat16=bool(_BFLOAT16_FLAGS & flags) and not is_limited,
        num_cores=num_cores(),
        memory_bytes=_memory(_CGROUP),
        gpus=_visible(_gpus(), os.environ.get("CUDA_VISIBLE_DEVICES")),
    )


def _cpu() -> tuple[str, frozenset[str]]:
    """Return the CPU's name and its flags."""
    name, flags = platform.processor() or platform.machine(), frozenset[str]()
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8").splitlines()
    except OSError:
        return name, flags
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            name = value.strip()
        elif key.strip() in ("flags", "Features"):
            return name, frozenset(value.split())
    return name, flags


def _memory(cgroup: Path) -> int:
    """Return the bytes of this machine's memory, or of the control group's (version 2) where that has fewer."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(total, int((cgroup / "memory.max").read_text(encoding="utf-8")))
    except (OSError, ValueError):  # no such file, or "max"
        return total


def memory_left() -> int:
    """Return the bytes of memory that this process and others may take now."""
    return _memory_left(_MEMORY_INFO, _CGROUP)


def _memory_left(info: Path, cgroup: Path) -> int:
    """Return those of the machine, or of the control group (version 2) where it has fewer. What cached files take is
    left: the system drops them.
    """
    left = _memory(cgroup)
    try:
        left = min(left, _numbers(info)["MemAvailable:"] << 10)
        stat = _numbers(cgroup / "memory.stat")
        used = int((cgroup / "memory.current").read_text(encoding="utf-8"))
        return max(0, min(left, _memory(cgroup) - used + stat["active_file"] + stat["inactive_file"]))
    except (OSError, ValueError, KeyError):  # no such file, as outside of a control group
        return left


def _numbers(file: Path) -> dict[str, int]:
    """Return the first number of each line by its first word."""
    lines = (line.split() for line in file.read_text(encoding="utf-8").splitlines())
    return {words[0]: int(words[1]) for words in lines}


@cache
def _gpus() -> tuple[Gpu, ...]:
    try:
        done = subprocess.run(_NVIDIA_SMI, capture_output=True, text=True, check=True, timeout=_NVIDIA_TIMEOUT_S)
        return tuple(_gpu(line) for line in done.stdout.splitlines() if line.strip())
    except (OSError, subprocess.SubprocessError, ValueError):  # no driver, or one that answers otherwise
        return ()


def _gpu(line: str) -> Gpu:
    name, mebibytes, capability = (field.strip() for field in line.rsplit(",", 2))
    major, minor = capability.split(".")
    return Gpu(name.removeprefix("NVIDIA "), int(mebibytes) << 20, (int(major), int(minor)))


def _visible(gpus: tuple[Gpu, ...], variable: str | None) -> tuple[Gpu, ...]:
    """Return those that CUDA_VISIBLE_DEVICES leaves to this process: indices, or names of which only the number
    counts.
    """
    if variable is None:
        return gpus
    wanted = [part.strip() for part in variable.split(",") if part.strip()]
    if all(part.isdigit() for part in wanted):
        return tuple(gpus[int(part)] for part in wanted if int(part) < len(gpus))
    return () if wanted[0].startswith("-") else gpus[: len(wanted)]


def _path(home: Path, found: Hardware) -> Path:
    """Homes may be shared by machines of several kinds."""
    digest = hashlib.sha256(json.dumps(asdict(found), sort_keys=True).encode()).hexdigest()
    return home / f"machine-{digest[:12]}.json"


def _cached(home: Path, found: Hardware) -> Rates | None:
    try:
        read = json.loads(_path(home, found).read_text(encoding="utf-8"))
        return Rates.from_json(read["rates"]) if read["version"] == _VERSION else None
    except (OSError, ValueError, TypeError, KeyError):
        return None
