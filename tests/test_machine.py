"""What a machine is, which dtypes fit it, and rates that are cached for it alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from loray import machine
from loray.machine import Gpu, GpuRates, Hardware, Machine, Rates, hardware, serving_dtype, training_dtype
from loray.planning.devices import PRESETS, gpu_here
from loray.recipes.resolve import on_hardware
from loray.spec import DType
from tests.fixtures.machines import AVX2, H100
from tests.fixtures.planning import HARDWARE, recipe

X86 = "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu sse2 {}\n\nprocessor\t: 1\n"
ARM = "processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: fp asimd {}\n"
T4 = Gpu("Tesla T4", 15360 << 20, (7, 5))
RATES = Rates({"bfloat16": 2e10, "float32": 1e11}, 8e10, 9e10, 3e10, GpuRates(5e14, 2e12))


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No driver, no limits, and no answer from an earlier test."""
    monkeypatch.setattr(machine, "_NVIDIA_SMI", (str(tmp_path / "missing"),))
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    machine._gpus.cache_clear()
    yield
    machine._gpus.cache_clear()


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("text", "limit", "instruction_set", "multiplies"),
    [
        (X86.format("avx2 fma"), None, "AVX2", False),
        (X86.format("avx2 avx512f avx512_bf16"), None, "AVX-512 with bfloat16", True),
        (X86.format("avx2 avx512f avx512_bf16 amx_bf16"), None, "AMX", True),
        (X86.format("avx2 avx512f avx512_bf16"), "AVX2", "limited to AVX2", False),
        (X86.format("avx2 avx512f avx512_bf16"), "ALL", "AVX-512 with bfloat16", True),
        (X86.format("avx2 avx512f"), None, "AVX-512", False),
        (ARM.format(""), None, "NEON", False),
        (ARM.format("sve bf16"), None, "SVE", True),
    ],
)
def test_a_cpu_by_its_flags(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str,
    limit: str | None,
    instruction_set: str,
    multiplies: bool,
) -> None:
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(machine, "_CPU_INFO", tmp_path / "cpuinfo")
    if limit is not None:
        monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    found = hardware()
    assert (found.instruction_set, found.multiplies_bfloat16) == (instruction_set, multiplies)
    assert found.cpu == "A CPU" or text.startswith(ARM[:20])
    assert found.num_cores >= 1
    assert found.gpus == ()
    chosen = training_dtype(found, use_gpu=False)
    assert chosen.dtype == ("bfloat16" if multiplies else "float32")
    assert instruction_set in chosen.why


@pytest.mark.usefixtures("no_gpu")
def test_gpus_are_those_of_the_driver_that_this_process_may_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = tmp_path / "nvidia-smi"
    lines = "NVIDIA H100 80GB HBM3, 81559, 9.0\nTesla T4, 15360, 7.5\n"
    driver.write_text(f"#!/bin/sh\ncat <<END\n{lines}END\n")
    driver.chmod(0o755)
    monkeypatch.setattr(machine, "_NVIDIA_SMI", (str(driver),))
    assert hardware().gpus == (H100, T4)
    for variable, seen in (("1", (T4,)), ("", ()), ("-1", ()), ("GPU-1a2b", (H100,)), ("7", ())):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
        assert hardware().gpus == seen, variable
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "1 × H100 80GB HBM3 (85.5 GB), 1 × Tesla T4 (16.1 GB)" in hardware().describe()
    machine._gpus.cache_clear()
    driver.write_text("#!/bin/sh\necho Failed to initialize NVML\n")
    assert hardware().gpus == ()


def test_the_memory_of_a_container_is_its_limit(tmp_path: Path) -> None:
    whole = machine._memory(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert machine._memory(tmp_path) == whole
    (tmp_path / "memory.max").write_text("1048576\n")
    assert machine._memory(tmp_path) == 1 << 20


def test_the_memory_that_is_left_is_the_machines_or_the_containers(tmp_path: Path) -> None:
    info, whole = tmp_path / "meminfo", machine._memory(tmp_path)
    assert machine._memory_left(info, tmp_path) == whole
    info.write_text("MemTotal:  9000 kB\nMemAvailable:  3000 kB\nHugePages_Total:  0\n")
    assert machine._memory_left(info, tmp_path) == 3000 << 10
    (tmp_path / "memory.current").write_text("900000\n")
    (tmp_path / "memory.stat").write_text("anon 500000\nfile 400000\nactive_file 100000\ninactive_file 200000\n")
    for limit, left in (("max", 3000 << 10), ("1000000", 400_000), ("500000", 0)):
        (tmp_path / "memory.max").write_text(limit)
        assert machine._memory_left(info, tmp_path) == left


@pytest.mark.parametrize(
    ("found", "use_gpu", "has_kernels", "training", "serving"),
    [
        (HARDWARE, False, True, "bfloat16", "bfloat16"),
        (HARDWARE, False, False, "bfloat16", "bfloat16"),
        (AVX2, False, True, "float32", "bfloat16"),  # half of the bytes, multiplied as float32
        (AVX2, False, False, "float32", "float32"),
        (replace(AVX2, gpus=(H100,)), True, False, "bfloat16", "bfloat16"),
        (replace(HARDWARE, gpus=(T4,)), True, True, "float32", "float16"),
        (replace(HARDWARE, gpus=(H100, T4)), True, True, "float32", "float16"),  # what all of them can
        (AVX2, True, True, "bfloat16", "bfloat16"),  # on GPUs of other nodes
    ],
)
def test_the_dtype_that_fits(
    found: Hardware, use_gpu: bool, has_kernels: bool, training: DType, serving: DType
) -> None:
    assert training_dtype(found, use_gpu=use_gpu).dtype == training
    assert serving_dtype(found, use_gpu=use_gpu, has_kernels=has_kernels).dtype == serving


def test_a_recipe_leaves_dtype_and_gpu_to_the_hardware_or_says_them() -> None:
    spec = recipe(dtype="auto")
    assert (spec.dtype, spec.use_gpu) == ("auto", "auto")
    chosen, why = on_hardware(spec, AVX2)
    assert (chosen.dtype, chosen.use_gpu) == ("float32", False)
    assert why == "this CPU has no bfloat16 products (AVX2)"
    with_gpu = replace(AVX2, gpus=(H100,))
    assert on_hardware(spec, with_gpu).spec.use_gpu is True
    assert on_hardware(spec, with_gpu).spec.dtype == "bfloat16"
    two = recipe(dtype="auto", num_workers=2)  # one GPU is not enough for them
    assert on_hardware(two, with_gpu).spec.use_gpu is False
    assert on_hardware(two, with_gpu).spec.dtype == "float32"
    said, why = on_hardware(recipe(dtype="bfloat16", use_gpu=False), with_gpu)
    assert (said.dtype, said.use_gpu, why) == ("bfloat16", False, "the recipe says so")


def test_rates_are_cached_for_their_hardware(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = tmp_path / "home"
    monkeypatch.setattr(machine, "hardware", lambda: AVX2)
    assert Machine.here(home) == Machine(AVX2, None)
    Machine(AVX2, RATES).cache(home)
    assert Machine.here(home) == Machine(AVX2, RATES)
    (file,) = home.iterdir()
    for other in (HARDWARE, replace(AVX2, gpus=(H100,)), replace(AVX2, memory_bytes=1 << 30)):
        monkeypatch.setattr(machine, "hardware", lambda other=other: other)
        assert Machine.here(home).rates is None
    monkeypatch.setattr(machine, "hardware", lambda: AVX2)
    for text in ("", "[]", "{}", '{"version": 3, "rates": {}}', '{"version": 4, "rates": {"bandwidth": 1}}'):
        file.write_text(text)
        assert Machine.here(home).rates is None, text


def test_a_gpu_here_has_its_own_memory_and_the_makers_or_measured_rates() -> None:
    assert gpu_here(Machine(AVX2, RATES)) is None
    known = gpu_here(Machine(replace(AVX2, gpus=(H100, H100))))
    assert known is not None
    assert (known.name, known.memory_bytes, known.workers_per_node) == ("h100-80gb", 81559 << 20, 2)
    assert known.flops == PRESETS["h100-80gb"].flops
    other = Machine(replace(AVX2, gpus=(T4,)))
    assert gpu_here(other) is None  # nobody knows how fast it is
    device = gpu_here(other._replace(rates=RATES))
    assert device is not None
    assert (device.name, device.flops, device.training_dtype) == ("Tesla T4", 5e14, "float32")
    assert not device.is_host
