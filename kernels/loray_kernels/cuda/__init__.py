"""The ops for NVIDIA GPUs of compute capability 8.0 and later.

ops            chooses the kernel for each call
gather         launches the CUDA C++ kernels (csrc): decode, and copies of rows
tiles/         the Triton kernels and their launches: prompts, and rows of activations
flash          attention of prompts by FlashInfer, where it is installed
tables         a step's tables as device tensors
nvrtc, launch  compile and launch the CUDA C++ kernels
sampling/      a token for each row of logits: plain rows, and those with more (choosing)
pages          copies adapters from pinned host memory into blocks while steps run
padded, graphs decode steps of padded sizes, and their CUDA graphs
compile        compiles every kernel ahead of time, without a GPU
"""

from __future__ import annotations

import importlib.util

import torch

from loray_kernels.compiled import BackendUnavailable
from loray_kernels.ops import Ops


def use_device(device: torch.device) -> torch.device:
    """`device` with its index, and from now on the current device of this thread: each thread has its own.

    Devices other than CUDA's are returned as they are.
    """
    if device.type != "cuda":
        return device
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_device(device)
    return device


def cuda_ops(device: torch.device) -> Ops:
    """Kernels are launched on `device`, which becomes this thread's current device.

    BackendUnavailable says what is missing: a GPU that is new enough, Triton, CuPy or NVRTC.
    """
    if not torch.cuda.is_available():
        raise BackendUnavailable("the cuda kernels need an NVIDIA GPU and a torch that is built for CUDA")
    device = use_device(device)
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise BackendUnavailable(f"the cuda kernels need compute capability 8.0; {device} has less")
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailable("the cuda kernels need Triton: pip install 'loray[cuda]'")
    from loray_kernels.cuda.flash import flash_prompts
    from loray_kernels.cuda.gather import Gather
    from loray_kernels.cuda.launch import CupyLauncher
    from loray_kernels.cuda.ops import CudaOps
    from loray_kernels.cuda.tiles.launch import Tiles

    return CudaOps(Gather(CupyLauncher(device)), Tiles(), flash_prompts(device))
