"""`s2_attention`; CPU, SDPA and flash backends.

With `scaled_dot_product_attention`, autograd sees a slice for each run of heads and each stretch of segments. The
gradient of a slice is a tensor of full size, mostly zeros, and autograd adds them all. Here every gradient is written
once, to its place.

Shapes: B rows, T positions, H query heads, K key-value heads, R query heads of one, D head width.

Segments and key-value heads are folded into the batch, so that the kernel's own causal mask applies. The R query heads
of a key-value head read it with a stride of 0.

Shapes: B rows, T positions, H query heads, K key-value heads, h query heads of a run, D head width.

Shapes: B rows, T positions, H query heads, K key-value heads, h query heads of a run, N positions of all segments, S
segments, D head width.

cpu     loray_kernels.cpu.causal, as one node of the autograd graph
varlen  flash-attn's kernel for rows of any lengths, or torch's copy of it, on a GPU
sdpa    torch's scaled_dot_product_attention: any other device or dtype

Shapes: B rows, T positions, H query heads, K key-value heads, h and k of them, D head width.
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


def attend_groups(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, runs: Sequence[HeadGroup], scale: float | None
) -> Tensor:
    out_BTHD: Tensor = _Attend.apply(q_BHTD, k_BKTD, v_BKTD, runs, scale)  # type: ignore[no-untyped-call]
    return out_BTHD


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, runs: Sequence[HeadGroup], scale: float | None
    ) -> Tensor:
        out_BHTD = _for_queries(q_BHTD, runs)
        lses = []
        for run in runs:
            q, k, v, out = _taken(run, (q_BHTD, run.q), (k_BKTD, run.kv), (v_BKTD, run.kv), (out_BHTD, run.q))
            for block in blocks(run.segments):
                folded_q = block.fold(q, run.repeats)
                folded_k, folded_v = (block.fold(x, 1)[:, 0] for x in (k, v))
                folded, lse = causal_forward(folded_q, folded_k, folded_v, scale)
                for place, part in zip(block.views(out, run.repeats), block.unfold(folded, len(out)), strict=True):
                    place.copy_(part)
                lses.append(lse)
            _write_back(out_BHTD[:, run.q], out, run.segments)
        out_BTHD = out_BHTD.transpose(1, 2)
        ctx.save_for_backward(q_BHTD, k_BKTD, v_BKTD, out_BTHD, *lses)
        ctx.runs, ctx.scale = runs, scale
        return out_BTHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_BHTD, k_BKTD, v_BKTD, out_BTHD, *lses = ctx.saved_tensors
        out_BHTD, dout_BHTD = out_BTHD.transpose(1, 2), grads[0].transpose(1, 2)
        dq_BHTD, dk_BKTD, dv_BKTD = _for_queries(q_BHTD, ctx.runs), _zeros(k_BKTD), _zeros(v_BKTD)
        for run in ctx.runs:
            q, out, dout, dq = _taken(run, *((x, run.q) for x in (q_BHTD, out_BHTD, dout_BHTD, dq_BHTD)))
            k, v, dk, dv = _taken(run, *((x, run.kv) for x in (k_BKTD, v_BKTD, dk_BKTD, dv_BKTD)))
            for block in blocks(run.segments):
                folded_dout, folded_q, folded_out = (block.fold(x, run.repeats) for x in (dout, q, out))
                folded_k, folded_v = (block.fold(x, 1)[:, 0] for x in (k, v))
                folded_dq, *folded_dkv = causal_backward(
                    folded_dout, folded_q, folded_k, folded_v, folded_out, lses.pop(0), ctx.scale
                )
                for place, part in zip(block.views(dq, run.repeats), block.unfold(folded_dq, len(dq)), strict=True):
                    place.copy_(part)
                for x, folded in zip((dk, dv), folded_dkv, strict=True):
                    parts = block.unfold(folded[:, None], len(x))
                    for place, part in zip(block.views(x, 1), parts, strict=True):
                        place.add_(part)
            _write_back(dq_BHTD[:, run.q], dq, run.segments)
            _write_back(dk_BKTD[:, run.kv], dk, run.segments)
            _write_back(dv_BKTD[:, run.kv], dv, run.segments)
        return dq_BHTD, dk_BKTD, dv_BKTD, None, None


def _taken(run: HeadGroup, *tensors_and_heads: tuple[Tensor, slice]) -> list[Tensor]:
    return [take(x_BhTD[:, heads], run.segments) for x_BhTD, heads in tensors_and_heads]


def _write_back(x_BhTD: Tensor, taken: Tensor, segments: AttentionSegments) -> None:
    """Write the result of `take` to its positions in `x_BhTD`, unless it is a view of them."""
    if segments.order_N is not None:
        x_BThD = x_BhTD.transpose(1, 2)
        x_BThD.view(-1, *x_BThD.shape[2:]).index_copy_(0, segments.order_N, taken[0].transpose(0, 1))


def _for_queries(q_BHTD: Tensor, runs: Sequence[HeadGroup]) -> Tensor:
    """A tensor like the queries: zeros where the segments do not cover all positions, else uninitialised."""
    num_rows, num_heads, num_tokens, width = q_BHTD.shape
    if any(run.segments.order_N is not None or num_covered(run.segments) < num_tokens for run in runs):
        return _zeros(q_BHTD)
    return q_BHTD.new_empty(num_rows, num_tokens, num_heads, width).transpose(1, 2)


def _zeros(x_BhTD: Tensor) -> Tensor:
    """Zeros (B, h, T, D) in the memory layout (B, T, h, D), which projections and RoPE also use for their gradients."""
    num_rows, num_heads, num_tokens, width = x_BhTD.shape
    return x_BhTD.new_zeros(num_rows, num_tokens, num_heads, width).transpose(1, 2)


def attend_groups_sdpa(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, runs: Sequence[HeadGroup], scale: float | None
) -> Tensor:
    return torch.cat(
        [_attend(q_BHTD[:, run.q], k_BKTD[:, run.kv], v_BKTD[:, run.kv], run, scale) for run in runs], dim=2
    )


def _attend(q_BhTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, run: HeadGroup, scale: float | None) -> Tensor:
    """→ (B, T, h, D)"""
    q, k, v = (take(x, run.segments) for x in (q_BhTD, k_BKTD, v_BKTD))
    outs = {-1: q[:, :, :0].transpose(1, 2)}  # by first position; this empty one is for a batch without segments
    for block in blocks(run.segments):
        folded_k, folded_v = (block.fold(x, 1).expand(-1, run.repeats, -1, -1) for x in (k, v))
        folded = F.scaled_dot_product_attention(
            block.fold(q, run.repeats), folded_k, folded_v, is_causal=True, scale=scale
        )
        for (start, _), part in zip(block.stretches, block.unfold(folded, len(q)), strict=True):
            outs[start] = part.permute(0, 1, 4, 2, 3, 5).flatten(3, 4).flatten(1, 2)
    return spread(torch.cat([outs[start] for start in sorted(outs)], dim=1), run.segments, q_BhTD.shape)


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


def attend_groups_varlen(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, runs: Sequence[HeadGroup], scale: float | None
) -> Tensor:
    return torch.cat(
        [_attend_varlen(q_BHTD[:, run.q], k_BKTD[:, run.kv], v_BKTD[:, run.kv], run, scale) for run in runs], dim=2
    )


def _attend_varlen(q_BhTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, run: HeadGroup, scale: float | None) -> Tensor:
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
def _begins(segments: AttentionSegments, num_rows: int, device: torch.device) -> Tensor:
    """cu_seqlens (S + 1), int32: the first position of each segment, and the end of the last."""
    lengths = [length for length, num_segments in segments.buckets for _ in range(num_segments)] * num_rows
    return torch.tensor([0, *lengths]).cumsum(0, dtype=torch.int32).to(device)


Attend = Callable[[Tensor, Tensor, Tensor, Sequence[HeadGroup], float | None], Tensor]


def attend_groups_segments(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, runs: Sequence[HeadGroup], scale: float | None
) -> Tensor:
    """→ (B, T, H, D), 0 outside of segments. The runs contain every query head once, in order. `scale` None: 1/√D."""
    return select(q_BHTD)(q_BHTD, k_BKTD, v_BKTD, runs, scale)


def select(q_BHTD: Tensor) -> Attend:
    return _choose(q_BHTD.device, q_BHTD.dtype, q_BHTD.shape[-1])


@cache  # once a run, not once a layer: it looks for packages
def _choose(device: torch.device, dtype: torch.dtype, width: int) -> Attend:
    if device.type == "cpu":
        return attend_groups
    return attend_groups_varlen if fits(device, dtype, width) else attend_groups_sdpa


def s2_attention(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    *,
    group_size: int,
    document_ids_BT: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """S2-Attn of groups of G = `group_size` positions → (B, H, T, D).

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
    cuts = segment_batch(num_rows, num_tokens, group_size, document_ids_BT=document_ids_BT, device=q_BHTD.device)
    return attend(q_BHTD, k_BKTD, v_BKTD, cuts, scale=scale).transpose(1, 2)


def attend(
    q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, cuts: BatchSegments, *, scale: float | None = None
) -> Tensor:
    """S2-Attn with given cuts → (B, T, H, D)."""
    num_heads, num_kv_heads = q_BHTD.shape[1], k_BKTD.shape[1]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide by {num_kv_heads} key-value heads")
    middle, repeats = num_heads // 2, num_heads // num_kv_heads
    runs = [
        *split_heads(0, middle, repeats, cuts.plain),
        *split_heads(middle, num_heads, repeats, cuts.shifted),
    ]
    return attend_groups_segments(q_BHTD, k_BKTD, v_BKTD, runs, scale)


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
    """Attention of h neighbouring query heads with the k key-value heads that serve them → (B, T, h, D).

    `first` is the index of the first one among all query heads, and `repeats` query heads share a key-value head. Both
    determine which key-value head serves which query heads.
    """
    skipped = first % repeats  # query heads of the first key-value head before `first`
    runs = [
        run._replace(q=slice(run.q.start - skipped, run.q.stop - skipped))
        for run in split_heads(skipped, skipped + q_BhTD.shape[1], repeats, segments)
    ]
    return attend_groups_segments(q_BhTD, k_BkTD, v_BkTD, runs, scale)
