"""The op set for NVIDIA GPUs of compute capability 8.0 and later.

ops             which kernel does what
gather          launches of the CUDA C++ kernels (cuda/csrc): decode, and rows that move
tiles           launches of the Triton kernels (triton_*): prompts, and rows of activations
tables          a step's tables as device tensors
launch, nvrtc   compiling and launching the CUDA C++ kernels
pages           adapters from pinned host memory into blocks, beside the steps
graphs          decode steps as CUDA graphs
compile         every kernel ahead of time, without a GPU
"""

from __future__ import annotations

import importlib.util

import torch

from loray_kernels.build import BackendUnavailable
from loray_kernels.ops import Ops


def cuda_ops(device: torch.device) -> Ops:
    """Makes `device` torch's current one, where kernels are launched.

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
