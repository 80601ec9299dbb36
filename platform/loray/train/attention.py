"""Shifted sparse attention (S2-Attn): Chen et al., *LongLoRA* (ICLR 2024), section 3.2, causal without exception.

Shapes: B rows, T positions, H query heads, K key-value heads, R = H/K query heads of one key-value head, D head width;
N positions and L positions of one segment, M segments of one bucket.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loray.train.cuts import Cuts, Segments, compute_cuts


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

    The first H//2 query heads are plain: causal attention inside [0,G) [G,2G) …. The others are shifted: inside groups
    cut at 0, G/2, 3G/2, …, so that the first and the last are shorter. Nothing wraps around: no position sees a later
    one. A single head (H = 1) is a shifted one. T need not divide by G, and may be shorter than G/2.

    `document_ids_BT` adds a cut wherever the id changes (equal ids must be neighbours to be one document); a negative
    id is padding, on whichever side, and its output is 0. Groups are counted from a row's first column. `scale`
    defaults to 1/√D. Query head h uses key-value head h // (H/K); those are never repeated in memory.
    Raises ValueError where shapes do not fit.
    """
    num_rows, _, num_tokens, _ = q_BHTD.shape
    if k_BKTD.shape != v_BKTD.shape or k_BKTD.shape[::2] != q_BHTD.shape[::2]:
        shapes = ", ".join(str(tuple(x.shape)) for x in (q_BHTD, k_BKTD, v_BKTD))
        raise ValueError(f"q, k and v do not fit together: {shapes}")
    cuts = compute_cuts(num_rows, num_tokens, group_size, document_ids_BT=document_ids_BT, device=q_BHTD.device)
    return attend(q_BHTD, k_BKTD, v_BKTD, cuts, scale=scale).transpose(1, 2)


def attend(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, cuts: Cuts, *, scale: float | None = None) -> Tensor:
    """S2-Attn along cuts that are there already → (B, T, H, D)."""
    num_heads, num_kv_heads = q_BHTD.shape[1], k_BKTD.shape[1]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide by {num_kv_heads} key-value heads")
    middle, repeats = num_heads // 2, num_heads // num_kv_heads
    plain, shifted = slice(0, -(-middle // repeats)), slice(middle // repeats, None)
    parts = attend_heads(
        q_BHTD[:, :middle], k_BKTD[:, plain], v_BKTD[:, plain], cuts.plain, first=0, repeats=repeats, scale=scale
    )
    parts += attend_heads(
        q_BHTD[:, middle:],
        k_BKTD[:, shifted],
        v_BKTD[:, shifted],
        cuts.shifted,
        first=middle,
        repeats=repeats,
        scale=scale,
    )
    return torch.cat(parts, dim=2)


def attend_heads(
    q_BHTD: Tensor,
    k_BKTD: Tensor,
    v_BKTD: Tensor,
    segments: Segments,
    *,
    first: int,
    repeats: int,
    scale: float | None,
) -> list[Tensor]:
    """Neighbouring query heads, with the key-value heads that serve them → parts (B, T, H', D), in order of heads.

    `first` is the number of the first one among all query heads, R = `repeats`: together they say who serves whom.
    """
    skipped = first % repeats  # query heads of the first key-value head that are not among these
    parts = []
    for run in _runs(skipped, skipped + q_BHTD.shape[1], repeats):
        q_BhTD = q_BHTD[:, run.q.start - skipped : run.q.stop - skipped]
        parts.append(_attend_segments(q_BhTD, k_BKTD[:, run.kv], v_BKTD[:, run.kv], segments, scale))
    return parts


class _Run(NamedTuple):
    """Neighbouring query heads and their key-value heads, each of which serves equally many of them."""

    q: slice
    kv: slice


def _runs(start: int, stop: int, repeats: int) -> Iterator[_Run]:
    """Cover query heads [start, stop). A key-value head that serves both halves gives a run of its own in each."""
    while start < stop:
        kv = start // repeats
        if start % repeats or stop - start < repeats:
            end, kv_end = min(stop, (kv + 1) * repeats), kv + 1
        else:
            kv_end = stop // repeats
            end = kv_end * repeats
        yield _Run(slice(start, end), slice(kv, kv_end))
        start = end


def _attend_segments(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, segments: Segments, scale: float | None) -> Tensor:
    """→ (B, T, H, D), 0 where no segment is."""
    order_N = segments.order_N
    q, k, v = q_BHTD.transpose(1, 2), k_BKTD.transpose(1, 2), v_BKTD.transpose(1, 2)
    shape_BTHD = q.shape
    if order_N is not None:  # the batch becomes one row, segments of equal length side by side
        q, k, v = (x.flatten(0, 1).index_select(0, order_N)[None] for x in (q, k, v))
    outs, at = [], 0
    for length, num_segments in segments.buckets:
        span = slice(at, at + length * num_segments)
        outs.append(_causal(q[:, span], k[:, span], v[:, span], length, scale))
        at = span.stop
    if not outs:
        return torch.zeros_like(q_BHTD.transpose(1, 2))
    if order_N is None and at < shape_BTHD[1]:  # padding
        outs.append(outs[0].new_zeros(shape_BTHD[0], shape_BTHD[1] - at, *shape_BTHD[2:]))
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
    if order_N is None:
        return out
    flat = out.new_zeros(shape_BTHD.numel() // shape_BTHD[2:].numel(), *shape_BTHD[2:])
    return flat.index_copy(0, order_N, out[0]).view(shape_BTHD)


def _causal(q_BNHD: Tensor, k_BNKD: Tensor, v_BNKD: Tensor, length: int, scale: float | None) -> Tensor:
    """Causal attention inside each stretch of `length` positions → (B, N, H, D).

    Segments and key-value heads are folded into the batch, so that the kernel's own causal mask is the right one and
    the R query heads of a key-value head read it through a stride of 0.
    """
    num_rows, num_positions, num_heads, width = q_BNHD.shape
    num_kv_heads = k_BNKD.shape[2]
    segments, repeats = num_positions // length, num_heads // num_kv_heads

    def fold(x_BNKD: Tensor) -> Tensor:
        x = x_BNKD.reshape(num_rows, segments, length, num_kv_heads, width).permute(0, 1, 3, 2, 4)
        return x.reshape(-1, 1, length, width).expand(-1, repeats, -1, -1)

    q = q_BNHD.reshape(num_rows, segments, length, num_kv_heads, repeats, width).permute(0, 1, 3, 4, 2, 5)
    out = F.scaled_dot_product_attention(
        q.reshape(-1, repeats, length, width), fold(k_BNKD), fold(v_BNKD), is_causal=True, scale=scale
    )
    out = out.reshape(num_rows, segments, num_kv_heads, repeats, length, width).permute(0, 1, 4, 2, 3, 5)
    return out.reshape(num_rows, num_positions, num_heads, width)
