"""Launching by CuPy, on a module that stands in for it: what is loaded when, and what is said where it cannot be."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from loray_kernels import BackendUnavailable
from loray_kernels.cuda import launch
from loray_kernels.cuda import launch as nvrtc
from loray_kernels.cuda.launch import CupyLauncher


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
    assert cupy.loaded == [f"{name}-sm_90" for name in nvrtc.FILES]
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
    monkeypatch.setattr(nvrtc.importlib.util, "find_spec", lambda name: found)
    for of_torch, majors in (("13.0", [13, 12, 11]), ("12.8", [12, 13, 11]), (None, [13, 12, 11])):
        monkeypatch.setattr(torch.version, "cuda", of_torch)
        assert [nvrtc._major(path) for path in nvrtc._wheels()] == majors
