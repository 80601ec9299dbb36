"""Causal attention to segments, among them S2-Attn, by three backends with one signature (`Backend`).

    attend_cpu     loray_kernels.cpu.causal, as one node of the autograd graph
    attend_varlen  flash-attn's kernel for rows of any lengths, or torch's copy of it, on a GPU
    attend_sdpa    torch's scaled_dot_product_attention: any other device or dtype

Shapes: B rows, T positions, H query heads, K key-value heads, h and k of them, D head width, S segments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from loray.train.attention.segments import (
    AttentionSegments,
    BatchSegments,
    HeadGroup,
    blocks,
    num_covered,
    segment_batch,
    split_heads,
    spread,
    take,
)
from loray_kernels.cpu.causal import causal_backward, causal_forward

# (q (B, H, T, D), k and v (B, K, T, D), groups, scale) → (B, T, H, D), 0 outside of segments. The groups contain every
# query head once, in order. Scale None: 1/√D.
Backend = Callable[[Tensor, Tensor, Tensor, Sequence[HeadGroup], float | None], Tensor]


def s2_attention(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    *,
    group_size: int,
    document_ids_BT: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Compute S2-Attn of groups of G = `group_size` positions → (B, H, T, D).

    The first H//2 query heads are plain: causal attention inside [0,G) [G,2G) …. The others are shifted: their groups
    are cut at 0, G/2, 3G/2, …, so that the first and the last are shorter. No position attends to a later one. A single
    head (H = 1) is shifted. T need not be a multiple of G, and may be less than G/2.

    `document_ids_BT` adds a cut wherever the id changes (equal ids must be neighbours to be one document). A negative
    id is padding, on either side, and its output is 0. Groups are counted from a row's first column. `scale` defaults
    to 1/√D. Query head h uses key-value head h // (H/K), without copies of it. Raises ValueError where shapes do not
    fit.
    """
    num_rows, _, num_tokens, _ = q_BHTD.shape
    if k_BKTD.shape != v_BKTD.shape or k_BKTD.shape[::2] != q_BHTD.shape[::2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q_BHTD, k_BKTD, v_BKTD))
        raise ValueError(f"q, k and v do not fit together: {shapes}")
    segments = segment_batch(num_rows, num_tokens, group_size, document_ids_BT=document_ids_BT, device=q_BHTD.device)
    return attend(q_BHTD, k_BKTD, v_BKTD, segments, scale=scale).transpose(1, 2)


def attend(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, segments: BatchSegments, *, scale: float | None = None
) -> Tensor:
    """Compute S2-Attn over the segments of a batch → (B, T, H, D)."""
    num_heads, num_kv_heads = q_BHTD.shape[1], k_BKTD.shape[1]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide by {num_kv_heads} key-value heads")
    middle, repeats = num_heads // 2, num_heads // num_kv_heads
    groups = [
        *split_heads(0, middle, repeats, segments.plain),
        *split_heads(middle, num_heads, repeats, segments.shifted),
    ]
    return _attend_groups(q_BHTD, k_BKTD, v_BKTD, groups, scale)


def attend_heads(
    q_BhTD: Tensor,
    k_BkTD: Tensor,
    v_BkTD: Tensor,
    segments: AttentionSegments,
    *,
    first: int,
    repeats: int,
    scale: float | None = None,
) -> Tensor:
    """Compute attention of h neighbouring query heads with the k key-value heads that serve them → (B, T, h, D).

    `first` is the index of the first one among all query heads, and `repeats` query heads share a key-value head. Both
    determine which key-value head serves which query heads.
    """
    skipped = first % repeats  # query heads of the first key-value head before `first`
    groups = [
        group._replace(q=slice(group.q.start - skipped, group.q.stop - skipped))
        for group in split_heads(skipped, skipped + q_BhTD.shape[1], repeats, segments)
    ]
    return _attend_groups(q_BhTD, k_BkTD, v_BkTD, groups, scale)


def _attend_groups(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, groups: Sequence[HeadGroup], scale: float | None
) -> Tensor:
    backend = select_backend(q_BHTD.device, q_BHTD.dtype, q_BHTD.shape[-1])
    return backend(q_BHTD, k_BKTD, v_BKTD, groups, scale)


@cache  # once a run, not once a layer: it looks for packages
def select_backend(device: torch.device, dtype: torch.dtype, width: int) -> Backend:
    """Choose the backend for heads of this width."""
    if device.type == "cpu":
        return attend_cpu
    return attend_varlen if _has_kernel(device, dtype, width) else attend_sdpa


def _taken(group: HeadGroup, *tensors_and_heads: tuple[Tensor, slice]) -> list[Tensor]:
    return [take(x_BhTD[:, heads], group.segments) for x_BhTD, heads in tensors_and_heads]


# -- torch's scaled_dot_product_attention -----------------------------------------------------------------------------


def attend_sdpa(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, groups: Sequence[HeadGroup], scale: float | None
) -> Tensor:
    """Fold segments and key-value heads into the batch, so that the kernel's own causal mask applies.

    The R query heads of a key-value head read it with a stride of 0.
    """
    outs = []
    for group in groups:
        q, k, v = _taken(group, (q_BHTD, group.q), (k_BKTD, group.kv), (v_BKTD, group.kv))
        parts = {-1: q[:, :, :0].transpose(1, 2)}  # by first position; this empty one is for a batch without segments
        for block in blocks(group.segments):
            folded_k, folded_v = (block.fold(x, 1).expand(-1, group.repeats, -1, -1) for x in (k, v))
            folded = F.scaled_dot_product_attention(
                block.fold(q, group.repeats), folded_k, folded_v, is_causal=True, scale=scale
            )
            for (start, _), part in zip(block.stretches, block.unfold(folded, len(q)), strict=True):
                parts[start] = part.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)
        out_BNhD = torch.cat([parts[start] for start in sorted(parts)], dim=1)
        outs.append(spread(out_BNhD, group.segments, q_BHTD[:, group.q].shape))
    return torch.cat(outs, dim=2)


# -- kernels for rows of any lengths ----------------------------------------------------------------------------------

_DTYPES = (torch.float16, torch.bfloat16)
_MAX_WIDTH = 256
_CAPABILITY = (8, 0)  # Ampere, which both kernels need


def attend_varlen(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, groups: Sequence[HeadGroup], scale: float | None
) -> Tensor:
    """Pass the segments of all rows to the installed kernel as one packed row."""
    outs = []
    for group in groups:
        segments = group.segments
        covered = num_covered(segments)
        taken = _taken(group, (q_BHTD, group.q), (k_BKTD, group.kv), (v_BKTD, group.kv))
        q, k, v = (x.transpose(1, 2)[:, :covered] for x in taken)
        if covered:
            begins_S = _begins(segments, len(q), q.device)
            longest = max(length for length, _ in segments.buckets)
            packed = (x.flatten(0, 1) for x in (q, k, v))
            kernel = _kernel()
            assert kernel is not None, "`select_backend` looks for one"
            out = kernel.function(*packed, begins_S, begins_S, longest, longest, **kernel.options(scale))
            q = out.view(len(q), covered, *out.shape[1:])
        outs.append(spread(q, segments, q_BHTD[:, group.q].shape))
    return torch.cat(outs, dim=2)


def _has_kernel(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    if device.type != "cuda" or dtype not in _DTYPES or width > _MAX_WIDTH:
        return False
    if torch.cuda.get_device_capability(device) < _CAPABILITY or (kernel := _kernel()) is None:
        return False
    return width % 8 == 0 or kernel.options is _flash_options  # flash-attn pads other widths, torch does not


class _Kernel(NamedTuple):
    """A package's attention to segments. Its function takes packed queries, keys and values, `cu_seqlens` of queries
    and of keys, the longest segment of both, and what `options` returns for a scale.
    """

    function: Callable[..., Any]
    options: Callable[[float | None], dict[str, Any]]

    @property
    def takes_options(self) -> bool:
        """True where the installed version has these parameters."""
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
    """The backward pass asks itself whether algorithms are deterministic."""
    return {"scale": scale, "window_size": (-1, 0), "enable_gqa": True}


@lru_cache(maxsize=8)  # the plain and the shifted segments of a batch, for each of its layers
def _begins(segments: AttentionSegments, num_rows: int, device: torch.device) -> Tensor:
    """cu_seqlens (S + 1), int32: the first position of each segment, and the end of the last."""
    lengths = [length for length, num_segments in segments.buckets for _ in range(num_segments)] * num_rows
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)


# -- loray_kernels on a CPU -------------------------------------------------------------------------------------------


def attend_cpu(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, groups: Sequence[HeadGroup], scale: float | None
) -> Tensor:
    """Compute all groups in one node of the autograd graph, which writes every gradient once, to its place.

    With `scaled_dot_product_attention`, autograd sees a slice for each group and each stretch of segments. The gradient
    of a slice is a tensor of full size, mostly zeros, and autograd adds them all.
    """
    out_BTHD: Tensor = _CpuAttention.apply(q_BHTD, k_BKTD, v_BKTD, groups, scale)  # type: ignore[no-untyped-call]
    return out_BTHD


class _CpuAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, groups: Sequence[HeadGroup], scale: float | None
    ) -> Tensor:
        out_BHTD = _for_queries(q_BHTD, groups)
        lses = []
        for group in groups:
            q, k, v, out = _taken(group, (q_BHTD, group.q), (k_BKTD, group.kv), (v_BKTD, group.kv), (out_BHTD, group.q))
            for block in blocks(group.segments):
                folded_q = block.fold(q, group.repeats)
                folded_k, folded_v = (block.fold(x, 1)[:, 0] for x in (k, v))
                folded, lse = causal_forward(folded_q, folded_k, folded_v, scale)
                for place, part in zip(block.views(out, group.repeats), block.unfold(folded, len(out)), strict=True):
                    place.copy_(part)
                lses.append(lse)
            _write_back(out_BHTD[:, group.q], out, group.segments)
        out_BTHD = out_BHTD.transpose(1, 2)
        ctx.save_for_backward(q_BHTD, k_BKTD, v_BKTD, out_BTHD, *lses)
        ctx.groups, ctx.scale = groups, scale
        return out_BTHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_BHTD, k_BKTD, v_BKTD, out_BTHD, *lses = ctx.saved_tensors
        out_BHTD, dout_BHTD = out_BTHD.transpose(1, 2), grads[0].transpose(1, 2)
        dq_BHTD, dk_BKTD, dv_BKTD = _for_queries(q_BHTD, ctx.groups), _zeros(k_BKTD), _zeros(v_BKTD)
        for group in ctx.groups:
            q, out, dout, dq = _taken(group, *((x, group.q) for x in (q_BHTD, out_BHTD, dout_BHTD, dq_BHTD)))
            k, v, dk, dv = _taken(group, *((x, group.kv) for x in (k_BKTD, v_BKTD, dk_BKTD, dv_BKTD)))
            for block in blocks(group.segments):
                folded_dout, folded_q, folded_out = (block.fold(x, group.repeats) for x in (dout, q, out))
                folded_k, folded_v = (block.fold(x, 1)[:, 0] for x in (k, v))
                folded_dq, *folded_dkv = causal_backward(
                    folded_dout, folded_q, folded_k, folded_v, folded_out, lses.pop(0), ctx.scale
                )
                for place, part in zip(block.views(dq, group.repeats), block.unfold(folded_dq, len(dq)), strict=True):
                    place.copy_(part)
                for x, folded in zip((dk, dv), folded_dkv, strict=True):
                    parts = block.unfold(folded[:, None], len(x))
                    for place, part in zip(block.views(x, 1), parts, strict=True):
                        place.add_(part)
            _write_back(dq_BHTD[:, group.q], dq, group.segments)
            _write_back(dk_BKTD[:, group.kv], dk, group.segments)
            _write_back(dv_BKTD[:, group.kv], dv, group.segments)
        return dq_BHTD, dk_BKTD, dv_BKTD, None, None


def _write_back(x_BhTD: Tensor, taken: Tensor, segments: AttentionSegments) -> None:
    """Write the result of `take` to its positions in `x_BhTD`, unless it is a view of them."""
    if segments.order_N is not None:
        x_BThD = x_BhTD.transpose(1, 2)
        x_BThD.view(-1, *x_BThD.shape[2:]).index_copy_(0, segments.order_N, taken[0].transpose(0, 1))


def _for_queries(q_BHTD: Tensor, groups: Sequence[HeadGroup]) -> Tensor:
    """A tensor like the queries: zeros where the segments do not cover all positions, else uninitialised."""
    num_rows, num_heads, num_tokens, width = q_BHTD.shape
    if any(group.segments.order_N is not None or num_covered(group.segments) < num_tokens for group in groups):
        return _zeros(q_BHTD)
    return q_BHTD.new_empty(num_rows, num_tokens, num_heads, width).transpose(1, 2)


def _zeros(x_BhTD: Tensor) -> Tensor:
    """Zeros (B, h, T, D) in the memory layout (B, T, h, D), which projections and RoPE also use for their gradients."""
    num_rows, num_heads, num_tokens, width = x_BhTD.shape
    return x_BhTD.new_zeros(num_rows, num_tokens, num_heads, width).transpose(1, 2)
