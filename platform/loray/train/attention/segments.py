"""Causal attention inside segments: one function, with an implementation for each device and dtype.

cpu     loray_kernels.cpu.causal, as one node of the autograd graph
varlen  flash-attn's kernel for rows of any lengths, or torch's copy of it, on a GPU
sdpa    torch's scaled_dot_product_attention: any other device or dtype
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor

from loray.train.attention import cpu, sdpa, varlen
from loray.train.attention.runs import Run

Attend = Callable[[Tensor, Tensor, Tensor, Sequence[Run], float | None], Tensor]


def attend_runs(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, runs: Sequence[Run], scale: float | None) -> Tensor:
    """→ (B, T, H, D), 0 outside of segments. The runs contain every query head once, in order. `scale` None: 1/√D."""
    return select(q_BHTD)(q_BHTD, k_BKTD, v_BKTD, runs, scale)


def select(q_BHTD: Tensor) -> Attend:
    return _choose(q_BHTD.device, q_BHTD.dtype, q_BHTD.shape[-1])


@cache  # once a run, not once a layer: it looks for packages
def _choose(device: torch.device, dtype: torch.dtype, width: int) -> Attend:
    if device.type == "cpu":
        return cpu.attend_runs
    return varlen.attend_runs if varlen.fits(device, dtype, width) else sdpa.attend_runs
