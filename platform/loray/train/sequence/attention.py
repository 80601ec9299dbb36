"""S2-Attn over a sequence group, for this rank's queries, with its keys and values and those of its halo.

Shapes: B rows, H query heads, K key-value heads, L positions of this rank, h of a halo, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from loray.planning.exchange.halo import Half
from loray.train.attention.cuts import Segments
from loray.train.attention.shifted import attend_heads
from loray.train.sequence.cuts import ShardCuts
from loray.train.sequence.exchange import HaloExchange, bind


def attend_shard(
    q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, cuts: ShardCuts, *, layer: int, scale: float | None = None
) -> Tensor:
    """→ (B, L, H, D), this rank's part of the result of `loray.train.attention.shifted.attend` for whole rows.

    A collective call of `cuts.group`. `layer` is the key of this layer's halos for its recomputation.

    In each half, the segment with halo tokens has more keys than queries. Zeros replace the queries of other ranks, so
    that the causal kernel can be used: for a halo of half a group this is a third more work, in this segment.
    """
    plan = cuts.plan(q_BHLD.shape[1], k_BKLD.shape[1])
    kept = cuts.halos.pop(layer, None)
    exchange = HaloExchange(plan, cuts.group, kept)
    k_BKLD, v_BKLD, token = exchange.start(k_BKLD, v_BKLD)

    def attend(half: Half, segments: Segments, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        repeats = plan.num_heads // plan.num_kv_heads
        return attend_heads(q, k, v, segments, first=half.query_heads.start, repeats=repeats, scale=scale)

    halves = []
    for half, of_half in zip(plan.halves, (cuts.plain, cuts.shifted), strict=True):
        q, k, v = (
            q_BHLD[:, _slice(half.query_heads)],
            k_BKLD[:, _slice(half.kv_heads)],
            v_BKLD[:, _slice(half.kv_heads)],
        )
        apart = of_half.num_apart
        out = attend(half, of_half.local, q[:, :, apart:], k[:, :, apart:], v[:, :, apart:])
        halves.append((half, of_half, q, k, v, out))

    halos = exchange.finish(token)
    if cuts.keep_halos and kept is None and torch.is_grad_enabled():
        cuts.halos[layer] = halos.detach()
    outs: list[Tensor] = []
    for (half, of_half, q, k, v, out), halo in zip(halves, halos, strict=True):
        if of_half.first is not None:
            num_halo, num_first = of_half.num_halo, of_half.num_first
            first = attend(
                half,
                of_half.first,
                F.pad(q[:, :, :num_first], (0, 0, num_halo, 0)),
                torch.cat([halo.k, k[:, :, :num_first]], dim=2),
                torch.cat([halo.v, v[:, :, :num_first]], dim=2),
            )
            out = _join(first[:, num_halo:], out, of_half.num_apart)
        outs.append(out)
    return bind(torch.cat(outs, dim=2), halos)


def _slice(numbers: range) -> slice:
    return slice(numbers.start, numbers.stop)


def _join(first_BFHD: Tensor, local_BLHD: Tensor, num_apart: int) -> Tensor:
    """The first F positions and those from `num_apart` on. Where both contain a position, one of the values is 0."""
    if num_apart:
        return torch.cat([first_BFHD, local_BLHD], dim=1)
    num_first = first_BFHD.shape[1]
    return torch.cat([first_BFHD + local_BLHD[:, :num_first], local_BLHD[:, num_first:]], dim=1)
