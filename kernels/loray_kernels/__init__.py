"""One op set over a paged pool: batched LoRA and VeRA, paged attention, norms and embeddings with per-row weights.

`ops.Ops` is the set; `backend(name)` gives an implementation. `reference` is torch, right before fast, and the oracle
of every other backend; `cpu` is C++, compiled at first use.
"""

from __future__ import annotations

import logging
from functools import cache

import torch

from loray_kernels.build import BackendUnavailable
from loray_kernels.cpu import CpuOps
from loray_kernels.ops import (
    AttentionMeta,
    KvLayout,
    LinearWeights,
    LoraTable,
    Ops,
    RowTables,
    Segments,
    TokenRows,
    VeraTable,
)
from loray_kernels.reference import ReferenceOps

__all__ = [
    "AttentionMeta",
    "BackendUnavailable",
    "KvLayout",
    "LinearWeights",
    "LoraTable",
    "Ops",
    "RowTables",
    "Segments",
    "TokenRows",
    "VeraTable",
    "available",
    "backend",
]

_log = logging.getLogger("loray.kernels")


def backend(name: str, device: torch.device | str = "cpu") -> Ops:
    """The implementation called `name`, for tensors on `device`.

    "auto" is the fastest that runs there, with one warning when that is the reference for want of a compiler.
    ValueError lists the names there are; BackendUnavailable says why the one that was asked for cannot run.
    """
    kind = torch.device(device).type
    match name:
        case "reference":
            return ReferenceOps()
        case "cpu":
            if kind != "cpu":
                raise ValueError(f"the kernel backend 'cpu' is for tensors on the CPU, not on {kind}; take 'auto'")
            return CpuOps()
        case "auto":
            return _fastest(kind)
    raise ValueError(f"no kernel backend {name!r}; there is: auto, cpu, reference")


def available() -> tuple[str, ...]:
    """Names of the backends that run on this machine. Compiles what is not in the cache yet."""
    try:
        CpuOps()
    except BackendUnavailable:
        return ("reference",)
    return ("cpu", "reference")


def _fastest(kind: str) -> Ops:
    if kind == "cpu":
        try:
            return CpuOps()
        except BackendUnavailable as e:
            _warn_once(str(e))
    return ReferenceOps()


@cache
def _warn_once(why: str) -> None:
    _log.warning("using the slow reference kernels: %s", why)
