"""Compiling and launching: what is loaded when, on a module in CuPy's place, and what is said where it cannot be."""

from __future__ import annotations

import hashlib
import os
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from loray_kernels import ITEM_TOKENS, MAX_PAIR_RANK, BackendUnavailable, backend, use_device
from loray_kernels import sampling as draws
from loray_kernels.compiled import cache_folder
from loray_kernels.cuda import attention, launch, ops, sampling, tables, upload
from loray_kernels.cuda.launch import FILES, SOURCES, Compiled, CupyLauncher, compile_source
from loray_kernels.sampling import MAX_TOP


class CUDADriverError(RuntimeError):
    """As CuPy's."""


class FakeCupy(ModuleType):
    """A driver that is older than CuPy (`no_device`) or than NVRTC (`no_load`)."""

    def __init__(self) -> None:
        super().__init__("cupy")
        self.cuda = SimpleNamespace(Device=self._device)
        self.no_device = self.no_load = False
        self.device: list[int] = []
        self.loaded: list[str] = []
        self.launched: list[Any] = []

    def _device(self, index: int) -> Any:
        if self.no_device:
            raise CUDADriverError("CUDA driver version is insufficient for CUDA runtime version")
        fake = self

        class Device:
            def __enter__(self) -> None:
                fake.device.append(index)

            def __exit__(self, *error: object) -> None:
                fake.device.pop()

        return Device()

    def RawModule(self, *, path: str) -> Any:
        def load() -> None:
            assert self.device == [0]
            if self.no_load:
                raise CUDADriverError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION")
            self.loaded.append(path)

        def get_function(name: str) -> Any:
            return lambda *arguments, stream: self.launched.append((path, name, *arguments, stream.ptr))

        return SimpleNamespace(compile=load, get_function=get_function)


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    fake = FakeCupy()
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(launch, "cubin", lambda name, arch: Path(f"{name}-{arch}"))
    monkeypatch.setattr(launch, "version", lambda: (13, 2))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=77))
    return fake


def test_all_kernels_are_loaded_before_the_first_launch(cupy: FakeCupy) -> None:
    launcher = CupyLauncher(torch.device("cuda", 0))
    assert cupy.loaded == [f"{name}-sm_90" for name in launch.FILES]
    launcher("attention_decode_bf16", (1, 2, 3), 128, [5, np.float32(0.5)])
    assert cupy.launched == [
        ("attention.cu-sm_90", "attention_decode_bf16", (1, 2, 3), (128, 1, 1), (5, np.float32(0.5)), 77)
    ]


@pytest.mark.parametrize(("cuda", "driver"), [(13, "580"), (12, "525"), (14, "for CUDA 14")])
def test_a_driver_that_cannot_load_them_is_told_in_one_sentence(
    cupy: FakeCupy, monkeypatch: pytest.MonkeyPatch, cuda: int, driver: str
) -> None:
    cupy.no_load = True
    monkeypatch.setattr(launch, "version", lambda: (cuda, 2))
    needed = rf"that CUDA {cuda} has compiled, which needs driver {driver} or later: update it, .*loray\[cuda12\].*PTX"
    with pytest.raises(BackendUnavailable, match=needed):
        CupyLauncher(torch.device("cuda", 0))


def test_a_driver_that_cupy_cannot_use_is_told(cupy: FakeCupy) -> None:
    cupy.no_device = True
    with pytest.raises(BackendUnavailable, match=r"CuPy cannot use the driver.*insufficient"):
        CupyLauncher(torch.device("cuda", 0))


@pytest.mark.parametrize(("of_torch", "extra"), [("12.8", "cuda12"), ("13.0", "cuda13"), (None, "cuda13")])
def test_without_cupy_the_extra_for_torchs_cuda_is_named(
    monkeypatch: pytest.MonkeyPatch, of_torch: str | None, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(torch.version, "cuda", of_torch)
    with pytest.raises(BackendUnavailable, match=rf"need CuPy: pip install 'loray\[{extra}\]'"):
        CupyLauncher(torch.device("cuda", 0))


def test_of_several_compilers_that_of_torchs_cuda_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("cuda_nvrtc/lib/libnvrtc.so.12", "cu13/lib/libnvrtc.so.13", "old/lib/libnvrtc.so.11.2"):
        (tmp_path / place).parent.mkdir(parents=True)
        (tmp_path / place).touch()
    found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(launch.importlib.util, "find_spec", lambda name: found)
    for of_torch, majors in (("13.0", [13, 12, 11]), ("12.8", [12, 13, 11]), (None, [13, 12, 11])):
        monkeypatch.setattr(torch.version, "cuda", of_torch)
        assert [launch._major(path) for path in launch._wheels()] == majors


def test_launches_and_kernels_agree() -> None:
    sources = {path.name: path.read_text() for path in SOURCES.iterdir()}

    def constant(file: str, name: str) -> int:
        (value,) = re.findall(rf"constexpr int {name} = (\d+);", sources[file])
        return int(value)

    assert constant("lora.cu", "TOKENS") == constant("vera.cu", "TOKENS") == tables.GATHER_TOKENS == ITEM_TOKENS
    assert constant("lora.cu", "WARPS") == constant("vera.cu", "WARPS") == ops.SHRINK_WARPS
    assert constant("vera.cu", "RANK") == MAX_PAIR_RANK
    assert 2 * constant("lora.cu", "THREADS") == 2 * ops.EXPAND_THREADS == tables.TILE_COLUMNS
    assert constant("splits.cuh", "SPLIT") == tables.SPLIT
    assert constant("splits.cuh", "MAX_SPLITS") == tables.MAX_SPLITS
    assert constant("splits.cuh", "GROUP") == attention.GROUP
    assert constant("tensor.cuh", "KEYS") == attention.TENSOR_KEYS
    assert constant("attention.cu", "HEAD") == attention.MAX_HEAD_DIM
    assert constant("draw.cuh", "THREADS") == constant("draw.cuh", "BLOCK") == sampling._THREADS
    assert constant("draw.cuh", "BLOCK") == draws._BLOCK
    assert constant("draw.cuh", "BLOCK") * constant("draw.cuh", "MAX_BLOCKS") == sampling.MAX_VOCAB <= 1 << 20
    assert constant("choose.cu", "MAX_TOP") == MAX_TOP
    threads = {ops.THREADS, attention.THREADS, upload._THREADS}
    assert {constant(f, "THREADS") for f in ("splits.cuh", "rows.cu", "vera.cu")} == threads
    assert constant("rows.cu", "NORM_THREADS") == ops.NORM_THREADS


def kept_log(name: str, arch: str) -> str:
    """What the compiler says of a source. To compile takes seconds, so it is kept until one of them changes."""
    digest = hashlib.sha256(f"{launch.version()} {arch}".encode())
    for path in (Path(launch.__file__), *sorted(SOURCES.iterdir())):
        digest.update(path.read_bytes())
    log = cache_folder() / "tests" / f"{name}-{arch}-{digest.hexdigest()[:16]}.log"
    if not log.exists():
        log.parent.mkdir(parents=True, exist_ok=True)
        whole = log.with_suffix(f".{os.getpid()}")
        whole.write_text(compile_source(name, arch).log)
        whole.replace(log)
    return log.read_text()


@pytest.mark.parametrize("arch", [*(pytest.param(a, marks=pytest.mark.slow) for a in ("sm_80", "sm_100")), "sm_90"])
def test_nvrtc_compiles_every_kernel(arch: str) -> None:
    """Without toolkit headers; no kernel spills registers."""
    try:
        logs = [kept_log(name, arch) for name in FILES]
    except BackendUnavailable as e:
        if "need NVRTC" in str(e):
            pytest.skip(str(e))
        raise
    spills = re.findall(r"(\d+) bytes spill stores", "".join(logs))
    assert len(spills) == 3 * 18 + 2 * 2 + 3  # in three dtypes, on tensor cores in two, those of any dtype
    assert set(spills) == {"0"}


def test_machine_code_is_kept_and_a_folder_that_cannot_be_written_to_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "version", lambda: (12, 8))
    monkeypatch.setattr(launch, "compile_source", lambda name, arch: Compiled(b"code", ""))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = launch.cubin("rows.cu", "sm_90")
    assert path.read_bytes() == b"code"
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(BackendUnavailable, match="set XDG_CACHE_HOME to a folder that can be written"):
        launch.cubin("rows.cu", "sm_90")


def test_without_a_gpu_the_backend_says_why() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(BackendUnavailable, match="need an NVIDIA GPU"):
        backend("cuda", "cuda")
    with pytest.raises(ValueError, match="on a GPU, not on cpu"):
        backend("cuda")
    assert type(backend("auto", "cuda")).__name__ == "ReferenceOps"


def test_a_device_without_an_index_is_the_threads_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    made_current: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", made_current.append)
    assert use_device(torch.device("cuda")) == torch.device("cuda", 3)
    assert use_device(torch.device("cuda:1")) == torch.device("cuda", 1)
    assert made_current == [torch.device("cuda", 3), torch.device("cuda", 1)]
    assert use_device(torch.device("cpu")) == torch.device("cpu")
    assert len(made_current) == 2
