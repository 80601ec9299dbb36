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
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loray.train.attention.cuts import Segments
from loray.train.attention.runs import Run, num_covered, spread, take

_DTYPES = (torch.float16, torch.bfloat16)
_MAX_WIDTH = 256
_CAPABILITY = (8, 0)  # Ampere, which both kernels need


class _Kernel(NamedTuple):
    """A package's attention to segments. Its function takes packed queries, keys and values, `cu_seqlens` of queries
    and of keys, the longest segment of both, and what `options` returns for a scale.
    """

    function: Callable[..., Any]
    options: Callable[[float | None], dict[str, Any]]

    @property
    def takes_options(self) -> bool:
        """Whether the installed version has these parameters."""
        try:
            signature(self.function).bind(*[None] * 7, **self.options(None))
        except TypeError:
            return False
        return True


@cache
def _kernel() -> _Kernel | None:
    """The first installed kernel that takes what is passed; None: there is none."""
    found = (
        _Kernel(getattr(import_module(module), name), options)
        for module, name, options in (
            ("flash_attn", "flash_attn_varlen_func", _flash_options),
            ("torch.nn.attention.varlen", "varlen_attn", _torch_options),
        )
        if find_spec(module) is not None
    )
    return next((kernel for kernel in found if kernel.takes_options), None)


def _flash_options(scale: float | None) -> dict[str, Any]:
    fixed = torch.are_deterministic_algorithms_enabled()  # the order in which the backward pass adds up
    return {"softmax_scale": scale, "causal": True, "deterministic": fixed}


def _torch_options(scale: float | None) -> dict[str, Any]:
    """Its backward pass asks itself whether algorithms are deterministic."""
    return {"scale": scale, "window_size": (-1, 0), "enable_gqa": True}


def fits(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether a kernel is installed that supports heads of this width on this device."""
    if device.type != "cuda" or dtype not in _DTYPES or width > _MAX_WIDTH:
        return False
    if torch.cuda.get_device_capability(device) < _CAPABILITY or (kernel := _kernel()) is None:
        return False
    return width % 8 == 0 or kernel.options is _flash_options  # flash-attn pads other widths, torch does not


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
        kernel = _kernel()
        assert kernel is not None, "see `fits`"
        out = kernel.function(*packed, begins_S, begins_S, longest, longest, **kernel.options(scale))
        q = out.view(len(q), covered, *out.shape[1:])
    return spread(q, segments, q_BhTD.shape)


@lru_cache(maxsize=8)  # the plain and the shifted segments of a batch, for each of its layers
def _begins(segments: Segments, num_rows: int, device: torch.device) -> Tensor:
    """cu_seqlens (S + 1), int32: the first position of each segment, and the end of the last."""
    lengths = [length for length, num_segments in segments.buckets for _ in range(num_segments)] * num_rows
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)
