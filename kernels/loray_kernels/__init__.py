"""One set of ops over a paged pool: batched LoRA and VeRA, paged attention, norms and embeddings with per-row weights.

`backend(name)` gives the ops of a backend.

    ops          the tables and weights that ops take
    kv           how blocks hold keys and values, and writing rows into the pool
    descriptors  where an adapter's rows are, in the device's memory
    decode       decode steps that a backend captures and replays
    sampling     a token for each row of logits
    prepare      what a backend makes of tables and weights once
    reference    the ops' equations, in torch; every other backend is made of it and tested against it
    cpu/         C++ (cpu/csrc), compiled at first use
    cuda/        CUDA C++ (cuda/csrc) and Triton, for NVIDIA GPUs
    compiled     where compiled kernels are kept
    memory       CPU memory in huge pages, and its reuse
"""

from __future__ import annotations

import logging
from functools import cache

import torch

from loray_kernels.compiled import BackendUnavailable
from loray_kernels.cpu.build import release_threads
from loray_kernels.cpu.ops import CpuOps
from loray_kernels.cuda import cuda_ops, device_memory, scratch_bytes, use_device, workspace_bytes
from loray_kernels.decode import (
    CaptureBarrier,
    CapturedDecoding,
    CapturedStep,
    CaptureLimits,
    CaptureState,
    DecodeStep,
    Decoding,
    Parts,
    StepDescriptors,
)
from loray_kernels.descriptors import (
    INPUTS,
    ITEM_TOKENS,
    MAX_PAIR_RANK,
    DescriptorAllocator,
    InputShape,
    LoraRows,
    Pair,
    RowOverrides,
    RowTables,
    StepVectors,
    VectorShape,
    descriptor_words,
    vector_words,
)
from loray_kernels.kv import AttentionMeta, KvLayout, PageCopy, PageWriter, to_device
from loray_kernels.ops import (
    AdapterSegments,
    ExpertWeights,
    LayerTables,
    LayerWeights,
    LinearWeights,
    LoraTable,
    ProjectionMatrix,
    QuantizedWeight,
    ScaleTable,
    Scoring,
    StepInputs,
    Turn,
    VeraTable,
    Weight,
)
from loray_kernels.reference import ReferenceOps
from loray_kernels.sampling import Change, Chooser, Chosen, Drawn, Draws, TokenEdits, TokenSet, TokenSlots

__all__ = [
    "INPUTS",
    "ITEM_TOKENS",
    "MAX_PAIR_RANK",
    "AdapterSegments",
    "AttentionMeta",
    "BackendUnavailable",
    "CaptureBarrier",
    "CaptureLimits",
    "CaptureState",
    "CapturedDecoding",
    "CapturedStep",
    "Change",
    "Chooser",
    "Chosen",
    "DecodeStep",
    "Decoding",
    "DescriptorAllocator",
    "Drawn",
    "Draws",
    "ExpertWeights",
    "InputShape",
    "KvLayout",
    "LayerTables",
    "LayerWeights",
    "LinearWeights",
    "LoraRows",
    "LoraTable",
    "Ops",
    "PageCopy",
    "PageWriter",
    "Pair",
    "Parts",
    "ProjectionMatrix",
    "QuantizedWeight",
    "RowOverrides",
    "RowTables",
    "ScaleTable",
    "Scoring",
    "StepDescriptors",
    "StepInputs",
    "StepVectors",
    "TokenEdits",
    "TokenSet",
    "TokenSlots",
    "Turn",
    "VectorShape",
    "VeraTable",
    "Weight",
    "available",
    "backend",
    "descriptor_words",
    "device_memory",
    "release_threads",
    "scratch_bytes",
    "to_device",
    "use_device",
    "vector_words",
    "workspace_bytes",
]

Ops = ReferenceOps  # every backend is one

_log = logging.getLogger("loray.kernels")


def backend(name: str, device: torch.device | str = "cpu") -> Ops:
    """Give the implementation called `name`, for tensors on `device`.

    "auto" is the fastest that runs there; if that is the reference because something is missing, one warning is logged.
    ValueError for an unknown name; BackendUnavailable says why the backend cannot run.
    """
    device = torch.device(device)
    match name:
        case "reference":
            return ReferenceOps()
        case "cpu":
            if device.type != "cpu":
                raise ValueError(f"the kernel backend 'cpu' is for tensors on the CPU, not on {device}; take 'auto'")
            return CpuOps()
        case "cuda":
            if device.type != "cuda":
                raise ValueError(f"the kernel backend 'cuda' is for tensors on a GPU, not on {device}; take 'auto'")
            return cuda_ops(device)
        case "auto":
            return _fastest(device)
    raise ValueError(f"no kernel backend {name!r}; there is: auto, cpu, cuda, reference")


def available() -> tuple[str, ...]:
    """List the backends that run on this machine. Compiles kernels that are not in the cache."""
    names = []
    for name, device in (("cuda", "cuda"), ("cpu", "cpu")):
        try:
            backend(name, device)
        except BackendUnavailable:
            continue
        names.append(name)
    return (*names, "reference")


def _fastest(device: torch.device) -> Ops:
    if device.type in ("cpu", "cuda"):
        try:
            return backend(device.type, device)
        except BackendUnavailable as e:
            _warn_once(str(e))
    return ReferenceOps()


@cache
def _warn_once(why: str) -> None:
    _log.warning("using the slow reference kernels: %s", why)
