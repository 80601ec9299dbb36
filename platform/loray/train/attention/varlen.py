"""Attention to segments of any lengths in one call on a GPU, given by their first positions: flash-attn (Dao, 2023),
or where that package is not installed, torch's copy of its kernel.

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
_CAPABILITY = (8, 0)  # Ampere, which both kernels need


def fits(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether the kernel supports heads of this width on this device."""
    if device.type != "cuda" or dtype not in _DTYPES or width > _MAX_WIDTH:
        return False
    is_padded = width % 8 == 0 or find_spec("flash_attn") is not None  # flash-attn pads other widths, torch does not
    return is_padded and torch.cuda.get_device_capability(device) >= _CAPABILITY


@cache
def _kernel() -> Callable[..., Tensor]:
    """flash_attn_varlen_func, or torch's with the same arguments."""
    if find_spec("flash_attn") is not None:
        kernel: Callable[..., Tensor] = import_module("flash_attn").flash_attn_varlen_func
        return kernel
    return _torch_kernel


def _torch_kernel(
    q_NHD: Tensor,
    k_NKD: Tensor,
    v_NKD: Tensor,
    begins_S: Tensor,
    ends_S: Tensor,
    longest_q: int,
    longest_k: int,
    *,
    softmax_scale: float | None,
    causal: bool,
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    out = varlen_attn(
        q_NHD,
        k_NKD,
        v_NKD,
        begins_S,
        ends_S,
        longest_q,
        longest_k,
        scale=softmax_scale,
        window_size=(-1, 0 if causal else -1),
        enable_gqa=True,
    )
    assert isinstance(out, Tensor), "no more was asked for"
    return out


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
        fixed = torch.are_deterministic_algorithms_enabled()  # the order in which the backward pass adds up
        out = _kernel()(
            *packed, begins_S, begins_S, longest, longest, softmax_scale=scale, causal=True, deterministic=fixed
        )
        q = out.view(len(q), covered, *out.shape[1:])
    return spread(q, segments, q_BhTD.shape)


@lru_cache(maxsize=8)  # the plain and the shifted segments of a batch, for each of its layers
def _begins(segments: Segments, num_rows: int, device: torch.device) -> Tensor:
    """cu_seqlens (S + 1), int32: the first position of each segment, and the end of the last."""
    lengths = [length for length, num_segments in segments.buckets for _ in range(num_segments)] * num_rows
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)
