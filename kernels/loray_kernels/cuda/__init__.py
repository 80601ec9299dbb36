"""The ops for NVIDIA GPUs of compute capability 8.0 and later.

ops             chooses the kernel for each call, and launches those in CUDA C++ (csrc)
attention       attention of decode steps: its work and launches
triton_kernels  the Triton kernels, for prompts; triton_launch launches them
flash           attention of prompts by FlashInfer, where it is installed
tables          a step's tables as device tensors
launch          compiles (NVRTC) and launches (CuPy) the CUDA C++ kernels
sampling        a token for each row of logits
upload          copies adapters from pinned host memory into blocks while steps run
graphs          decode steps of padded sizes, and their CUDA graphs
"""

from __future__ import annotations

import gc
import importlib.util

import torch

from loray_kernels.compiled import BackendUnavailable
from loray_kernels.reference import ReferenceOps

_CUBLAS_BYTES = 64 << 20  # its workspaces: of a card of 2022, 32 MiB for each of two streams


def use_device(device: torch.device) -> torch.device:
    """Make `device` the current device of this thread (each thread has its own), and return it with its index.

    Devices other than CUDA's are returned as they are.
    """
    if device.type != "cuda":
        return device
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    torch.cuda.set_device(device)
    return device


def cuda_ops(device: torch.device) -> ReferenceOps:
    """Make the ops whose kernels are launched on `device`, which becomes this thread's current device.

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
    from loray_kernels.cuda.launch import CupyLauncher
    from loray_kernels.cuda.ops import CudaOps
    from loray_kernels.cuda.triton_launch import Tiles

    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return CudaOps(CupyLauncher(device), Tiles(), flash_prompts(device), num_processors=processors)


def device_memory(device: torch.device) -> tuple[int, int, int]:
    """Bytes of a GPU: all, what is free, and what this process's tensors have taken, without what torch only keeps."""
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return total, free, torch.cuda.memory_reserved(device)


def scratch_bytes() -> dict[str, int]:
    """The most that kernels take of a GPU beside their arguments and results, by what it is for."""
    from loray_kernels.cuda.attention import PARTIAL_BYTES
    from loray_kernels.cuda.upload import STAGING_BYTES

    return {"partial sums": PARTIAL_BYTES, "staging": STAGING_BYTES, "cuBLAS": _CUBLAS_BYTES}


def workspace_bytes() -> dict[str, int]:
    """The part of a GPU that kernels have taken since the backend was made, by what it is for."""
    from loray_kernels.cuda.flash import WORKSPACE_BYTES

    return {"FlashInfer": WORKSPACE_BYTES} if importlib.util.find_spec("flashinfer") else {}
