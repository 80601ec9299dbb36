"""Attention with torch's scaled_dot_product_attention, differentiated by autograd, on any device and in any dtype.

Segments and key-value heads are folded into the batch, so that the kernel's own causal mask applies. The R query heads
of a key-value head read it with a stride of 0.

Shapes: B rows, T positions, H query heads, K key-value heads, h query heads of a run, D head width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from loray.train.attention.runs import Run, blocks, spread, take


def attend_runs(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, runs: Sequence[Run], scale: float | None) -> Tensor:
    return torch.cat(
        [_attend(q_BHTD[:, run.q], k_BKTD[:, run.kv], v_BKTD[:, run.kv], run, scale) for run in runs], dim=2
    )


def _attend(q_BhTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, run: Run, scale: float | None) -> Tensor:
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
