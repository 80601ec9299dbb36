"""Launching the CUDA C++ kernels with CuPy, on torch's current stream.

Tests use another Launcher, which runs the same kernels on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from loray_kernels.compiled import BackendUnavailable
from loray_kernels.cuda.nvrtc import FILES, cubin, version

Argument = int | np.float32
_DRIVERS = {12: "525", 13: "580"}  # the oldest that run what a major version of CUDA has compiled
SUFFIX = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


class Launcher(Protocol):
    def __call__(self, kernel: str, grid: tuple[int, int, int], threads: int, arguments: Sequence[Argument]) -> None:
        """Queue a kernel. Integers and addresses are 64 bits wide. The caller keeps alive what addresses point to."""
        ...


class _Stream(NamedTuple):
    ptr: int


class CupyLauncher:
    """BackendUnavailable without CuPy or NVRTC, or with a driver too old for CuPy or for what NVRTC has made."""

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
    """The source of a kernel: named by the kernel's first word, or rows.cu."""
    name = f"{kernel.partition('_')[0]}.cu"
    return name if name in FILES else "rows.cu"
