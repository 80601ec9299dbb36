"""Shifted sparse attention (S2-Attn): Chen et al., *LongLoRA* (ICLR 2024), section 3.2, without its wrap-around.

Shapes: B rows, T positions, H query heads, K key-value heads, h and k of them, D head width.
"""

from __future__ import annotations

from torch import Tensor

from loray.train.attention.cuts import Cuts, Segments, compute_cuts
from loray.train.attention.runs import split_runs
from loray.train.attention.segments import attend_runs


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
    cuts = compute_cuts(num_rows, num_tokens, group_size, document_ids_BT=document_ids_BT, device=q_BHTD.device)
    return attend(q_BHTD, k_BKTD, v_BKTD, cuts, scale=scale).transpose(1, 2)


def attend(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, cuts: Cuts, *, scale: float | None = None) -> Tensor:
    """S2-Attn with given cuts → (B, T, H, D)."""
    num_heads, num_kv_heads = q_BHTD.shape[1], k_BKTD.shape[1]
    if num_heads % num_kv_heads:
        raise ValueError(f"{num_heads} query heads do not divide by {num_kv_heads} key-value heads")
    middle, repeats = num_heads // 2, num_heads // num_kv_heads
    runs = [
        *split_runs(0, middle, repeats, cuts.plain),
        *split_runs(middle, num_heads, repeats, cuts.shifted),
    ]
    return attend_runs(q_BHTD, k_BKTD, v_BKTD, runs, scale)


def attend_heads(
    q_BhTD: Tensor,
    k_BkTD: Tensor,
    v_BkTD: Tensor,
    segments: Segments,
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
        for run in split_runs(skipped, skipped + q_BhTD.shape[1], repeats, segments)
    ]
    return attend_runs(q_BhTD, k_BkTD, v_BkTD, runs, scale)
