"""Causal attention to segments, among them S2-Attn, by three backends with one signature (`Backend`).

    attend_cpu     loray_kernels.cpu.causal, as one node of the autograd graph
    attend_varlen  flash-attn's kernel for rows of any lengths, or torch's copy of it, on a GPU
    attend_sdpa    torch's scaled_dot_product_attention: any other device or dtype

Shapes: B rows, T positions, N = B·T; H query heads, K key-value heads, h and k of them, D head width, S segments; F
segments with their key-value heads, R query heads of each, L positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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
    Block,
    HeadGroup,
    blocks,
    segment_batch,
    split_heads,
)
from loray_kernels.cpu.causal import causal_backward, causal_forward

# (q (N, H, D), k and v (N, K, D), groups, scale) → (N, H, D), 0 outside of segments. The groups contain every query
# head once, in order. Scale None: 1/√D.
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
    segments = segment_batch(num_rows, num_tokens, group_size, document_ids_BT=document_ids_BT)
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
    num_rows, _, num_tokens, width = q_BHTD.shape
    backend = select_backend(q_BHTD.device, q_BHTD.dtype, width)
    # All positions, row after row: views in transformers' memory layout.
    q_NHD, k_NKD, v_NKD = (x.transpose(1, 2).flatten(0, 1) for x in (q_BHTD, k_BKTD, v_BKTD))
    return backend(q_NHD, k_NKD, v_NKD, groups, scale).view(num_rows, num_tokens, -1, width)


@cache  # once a run, not once a layer: it looks for packages
def select_backend(device: torch.device, dtype: torch.dtype, width: int) -> Backend:
    """Choose the backend for heads of this width."""
    if device.type == "cpu":
        return attend_cpu
    return attend_varlen if _has_kernel(device, dtype, width) else attend_sdpa


def _by_group(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, groups: Sequence[HeadGroup]
) -> Iterator[tuple[HeadGroup, Tensor, Tensor, Tensor]]:
    """Yield each group with its heads. The backward pass of a split joins gradients once; that of each slice makes a
    tensor of full size, mostly zeros.
    """
    kv, sizes = [group.kv for group in groups], [group.q.stop - group.q.start for group in groups]
    ends = [part.stop for part in kv]
    if [part.start for part in kv] == [0, *ends[:-1]] and ends[-1] == k_NKD.shape[1]:
        of_k, of_v = (torch.split(x, [part.stop - part.start for part in kv], dim=1) for x in (k_NKD, v_NKD))
    else:  # a key-value head in both halves
        of_k, of_v = (tuple(x[:, part] for part in kv) for x in (k_NKD, v_NKD))
    yield from zip(groups, torch.split(q_NHD, sizes, dim=1), of_k, of_v, strict=True)


def _spread(values: Tensor, of_blocks: Sequence[Block], num_positions: int) -> Tensor:
    """Write the values that the blocks took, one after the other, to their positions, and 0 elsewhere: (N, h, D)."""
    if [block.positions for block in of_blocks] == [slice(0, num_positions)]:
        return values
    every_N = torch.arange(num_positions, device=values.device)
    positions = torch.cat([every_N[:0], *(block.take(every_N) for block in of_blocks)])
    return values.new_zeros(num_positions, *values.shape[1:]).index_copy(0, positions, values)


# -- torch's scaled_dot_product_attention -----------------------------------------------------------------------------


def attend_sdpa(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, groups: Sequence[HeadGroup], scale: float | None
) -> Tensor:
    """Fold segments and key-value heads into the batch, so that the kernel's own causal mask applies.

    The R query heads of a key-value head read it with a stride of 0.
    """
    outs = []
    for group, q, k, v in _by_group(q_NHD, k_NKD, v_NKD, groups):
        of_group = blocks(group.segments, q.device)
        parts = [q[:0]]  # empty, for a batch without segments
        for block in of_group:
            folded_k, folded_v = (block.fold(x, 1).expand(-1, group.repeats, -1, -1) for x in (k, v))
            folded = F.scaled_dot_product_attention(
                block.fold(q, group.repeats), folded_k, folded_v, is_causal=True, scale=scale
            )
            parts.append(block.unfold(folded, q.shape[1]))
        outs.append(_spread(torch.cat(parts), of_group, len(q)))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


# -- kernels for rows of any lengths ----------------------------------------------------------------------------------

_DTYPES = (torch.float16, torch.bfloat16)
_MAX_WIDTH = 256
_CAPABILITY = (8, 0)  # Ampere, which both kernels need
_PIECE = 128  # positions of what is in no segment that are attended to together: their time grows with its square


def attend_varlen(
    q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, groups: Sequence[HeadGroup], scale: float | None
) -> Tensor:
    """Pass all rows to the installed kernel as one packed row, where they lie: `cu_seqlens` says where segments begin.

    What is in no segment is attended to in short pieces, and its output is 0: to gather the others would copy q, k, v
    and the output.
    """
    kernel = _kernel()
    assert kernel is not None, "`select_backend` looks for one"
    outs = []
    for group, q, k, v in _by_group(q_NHD, k_NKD, v_NKD, groups):
        begins_S, longest, is_real_N = _covering(group.segments, len(q), q.device)
        out = kernel.function(q, k, v, begins_S, begins_S, longest, longest, **kernel.options(scale))
        outs.append(out if is_real_N is None else torch.where(is_real_N[:, None, None], out, 0.0))
    return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)


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


@lru_cache(maxsize=16)  # the plain and the shifted segments of a batch, for each of its layers
def _covering(
    segments: AttentionSegments, num_positions: int, device: torch.device
) -> tuple[Tensor, int, Tensor | None]:
    """Cover all positions: cu_seqlens (S + 1) in int32, the length of the longest segment, and which positions were in
    one, None where all were.
    """
    starts_G = F.pad(segments.begins_S + segments.lengths_S, (1, 0))  # of the gaps around segments, most of them empty
    ends_G = F.pad(segments.begins_S, (0, 1), value=num_positions)
    is_gap_G = starts_G < ends_G
    gaps = list(zip(starts_G[is_gap_G].tolist(), ends_G[is_gap_G].tolist(), strict=True))
    begins_S = torch.cat([segments.begins_S, *(torch.arange(*gap, _PIECE) for gap in gaps)]).sort().values
    begins_S = F.pad(begins_S, (0, 1), value=num_positions)
    is_real_N = torch.ones(num_positions, dtype=torch.bool)
    for start, end in gaps:
        is_real_N[start:end] = False
    return begins_S.int().to(device), int(begins_S.diff().max()), is_real_N.to(device) if gaps else None


# -- loray_kernels on a CPU -------------------------------------------------------------------------------------------


def attend_cpu(q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, groups: Sequence[HeadGroup], scale: float | None) -> Tensor:
    """Compute all groups in one node of the autograd graph, which writes every gradient once, to its place.

    With `scaled_dot_product_attention`, autograd sees a slice for each group. The gradient of a slice is a tensor of
    full size, mostly zeros, and autograd adds them all.
    """
    out_NHD: Tensor = _CpuAttention.apply(q_NHD, k_NKD, v_NKD, groups, scale)  # type: ignore[no-untyped-call]
    return out_NHD


class _CpuAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_NHD: Tensor, k_NKD: Tensor, v_NKD: Tensor, groups: Sequence[HeadGroup], scale: float | None
    ) -> Tensor:
        out_NHD = _for_queries(q_NHD, groups)
        lses_FRL = []
        for group in groups:
            q, k, v, out = q_NHD[:, group.q], k_NKD[:, group.kv], v_NKD[:, group.kv], out_NHD[:, group.q]
            for block in blocks(group.segments, q.device):
                q_FRLD, k_FLD, v_FLD = block.fold(q, group.repeats), block.fold(k, 1)[:, 0], block.fold(v, 1)[:, 0]
                out_FRLD, lse_FRL = causal_forward(q_FRLD, k_FLD, v_FLD, scale)
                block.put(out, out_FRLD)
                lses_FRL.append(lse_FRL)
        ctx.save_for_backward(q_NHD, k_NKD, v_NKD, out_NHD, *lses_FRL)
        ctx.groups, ctx.scale = groups, scale
        return out_NHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_NHD, k_NKD, v_NKD, out_NHD, *lses_FRL = ctx.saved_tensors
        dq_NHD = _for_queries(q_NHD, ctx.groups)
        dk_NKD, dv_NKD = (x.new_zeros(x.shape) for x in (k_NKD, v_NKD))
        for group in ctx.groups:
            q, out, dout, dq = (x[:, group.q] for x in (q_NHD, out_NHD, grads[0], dq_NHD))
            k, v, dk, dv = (x[:, group.kv] for x in (k_NKD, v_NKD, dk_NKD, dv_NKD))
            for block in blocks(group.segments, q.device):
                dout_FRLD, q_FRLD, out_FRLD = (block.fold(x, group.repeats) for x in (dout, q, out))
                k_FLD, v_FLD = (block.fold(x, 1)[:, 0] for x in (k, v))
                dq_FRLD, *dkv_FLD = causal_backward(
                    dout_FRLD, q_FRLD, k_FLD, v_FLD, out_FRLD, lses_FRL.pop(0), ctx.scale
                )
                block.put(dq, dq_FRLD)
                for x, dx_FLD in zip((dk, dv), dkv_FLD, strict=True):
                    block.add(x, dx_FLD[:, None])
        return dq_NHD, dk_NKD, dv_NKD, None, None


def _for_queries(q_NHD: Tensor, groups: Sequence[HeadGroup]) -> Tensor:
    """Like the queries: zeros where the segments do not cover all positions, else uninitialised."""
    is_covered = all(group.segments.num_covered == len(q_NHD) for group in groups)
    return q_NHD.new_empty(q_NHD.shape) if is_covered else q_NHD.new_zeros(q_NHD.shape)
