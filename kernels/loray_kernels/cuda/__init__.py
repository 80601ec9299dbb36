"""The ops for NVIDIA GPUs of compute capability 8.0 and later.

ops            chooses the kernel for each call
gather         launches the CUDA C++ kernels (csrc): decode, and copies of rows
tiles/         the Triton kernels and their launches: prompts, and rows of activations
tables         a step's tables as device tensors
nvrtc, launch  compile and launch the CUDA C++ kernels
pages          copies adapters from pinned host memory into blocks while steps run
graphs         decode steps as CUDA graphs
compile        compiles every kernel ahead of time, without a GPU
"""

from __future__ import annotations

import importlib.util

import torch

from loray_kernels.compiled import BackendUnavailable
from loray_kernels.ops import Ops


def cuda_ops(device: torch.device) -> Ops:
    """Makes `device` torch's current device, on which kernels are launched.

    BackendUnavailable says what is missing: a GPU that is new enough, Triton, CuPy or NVRTC.
    """
    if not torch.cuda.is_available():
        raise BackendUnavailable("the cuda kernels need an NVIDIA GPU and a torch that is built for CUDA")
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise BackendUnavailable(f"the cuda kernels need compute capability 8.0; {device} has less")
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailable("the cuda kernels need Triton: pip install 'loray[cuda]'")
    from loray_kernels.cuda.gather import Gather
    from loray_kernels.cuda.launch import CupyLauncher
    from loray_kernels.cuda.ops import CudaOps
    from loray_kernels.cuda.tiles.launch import Tiles

    torch.cuda.set_device(device)
    return CudaOps(Gather(CupyLauncher(device)), Tiles())
