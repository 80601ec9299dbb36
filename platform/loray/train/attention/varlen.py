"""Attention with flash-attn (Dao, 2023): segments of any lengths in one call, given by their first positions.

Shapes: B rows, T positions, H query heads, K key-value heads, h query heads of a run, N positions of all segments, S
segments, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor

from loray.train.attention.cuts import Segments
from loray.train.attention.runs import Run, num_covered, spread, take

_DTYPES = (torch.float16, torch.bfloat16)
_MAX_WIDTH = 256


def fits(q_BHTD: Tensor) -> bool:
    """Whether flash-attn is installed and supports such tensors."""
    is_supported = q_BHTD.is_cuda and q_BHTD.dtype in _DTYPES and q_BHTD.shape[-1] <= _MAX_WIDTH
    return is_supported and find_spec("flash_attn") is not None


@cache
def _kernel() -> Callable[..., Tensor]:
    kernel: Callable[..., Tensor] = import_module("flash_attn").flash_attn_varlen_func
    return kernel


def attend_runs(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, runs: Sequence[Run], scale: float | None) -> Tensor:
    return torch.cat(
        [_attend(q_BHTD[:, run.q], k_BKTD[:, run.kv], v_BKTD[:, run.kv], run, scale) for run in runs], dim=2
    )


def _attend(q_BhTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, run: Run, scale: float | None) -> Tensor:
    """→ (B, T, h, D)"""
    segments = run.segments
    covered = num_covered(segments)
    q, k, v = (take(x, segments).transpose(1, 2)[:, :covered] for x in (q_BhTD, k_BKTD, v_BKTD))
    if covered:
        begins_S = _begins(segments, len(q), q.device)
        longest = max(length for length, _ in segments.buckets)
        packed = (x.flatten(0, 1) for x in (q, k, v))
        out = _kernel()(*packed, begins_S, begins_S, longest, longest, softmax_scale=scale, causal=True)
        q = out.view(len(q), covered, *out.shape[1:])
    return spread(q, segments, q_BhTD.shape)


@lru_cache(maxsize=8)  # the plain and the shifted segments of a batch, for each of its layers
def _begins(segments: Segments, num_rows: int, device: torch.device) -> Tensor:
    """cu_seqlens (S + 1), int32: the first position of each segment, and the end of the last."""
    lengths = [length for length, num_segments in segments.buckets for _ in range(num_segments)] * num_rows
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)
