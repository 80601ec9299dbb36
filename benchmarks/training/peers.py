"""Dense causal attention over a sequence group, forward pass: minimal versions of Ulysses and of ring attention.

Each returns its output and the bytes that it sent to other ranks, which are compared with the halo of S2-Attn.

Shapes: B rows, H query heads, K key-value heads, L positions of this rank, N = P·L of the whole row, D head width.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from loray.train.sequence import SequenceGroup


class Sharded(NamedTuple):
    """`out` is (B, H, L, D)."""

    out: Tensor
    sent_bytes: int


def ulysses(q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, group: SequenceGroup) -> Sharded:
    """Jacobs et al., *DeepSpeed Ulysses*, 2023: all-to-all exchanges positions for heads, and back. ValueError unless P
    divides H and K.
    """
    if q_BHLD.shape[1] % group.size or k_BKLD.shape[1] % group.size:
        raise ValueError(f"{q_BHLD.shape[1]} and {k_BKLD.shape[1]} heads do not split over {group.size} ranks")
    parts, sent = zip(*(_swap(x, group, scatter=1, gather=2) for x in (q_BHLD, k_BKLD, v_BKLD)), strict=True)
    out, sent_back = _swap(_dense(*parts), group, scatter=2, gather=1)
    return Sharded(out, sum(sent) + sent_back)


def _swap(x: Tensor, group: SequenceGroup, *, scatter: int, gather: int) -> tuple[Tensor, int]:
    outgoing = [part.contiguous() for part in x.chunk(group.size, scatter)]
    incoming = [torch.empty_like(part) for part in outgoing]
    dist.all_to_all(incoming, outgoing, group=group.process_group)
    return torch.cat(incoming, gather), sum(x.nbytes for rank, x in enumerate(outgoing) if rank != group.rank)


def ring(q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, group: SequenceGroup) -> Sharded:
    """Liu et al., *Ring Attention*, 2023: keys and values move to the next rank P − 1 times."""
    rank, size = group.rank, group.size
    held, sent = torch.stack([k_BKLD, v_BKLD]), 0
    found: dict[int, Tensor] = {}
    for hop in range(size):
        found[(rank - hop) % size] = held
        if hop < size - 1:
            coming = torch.empty_like(held)
            right, left = (rank + 1) % size, (rank - 1) % size
            ops = [
                dist.P2POp(dist.isend, held, group=group.process_group, group_peer=right),
                dist.P2POp(dist.irecv, coming, group=group.process_group, group_peer=left),
            ]
            for work in dist.batch_isend_irecv(ops):
                work.wait()
            sent += held.nbytes
            held = coming
    k, v = torch.cat([found[r] for r in range(rank + 1)], dim=3)  # kept whole, since bytes are counted and not memory
    return Sharded(_dense(q_BHLD, k, v), sent)


def _dense(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor) -> Tensor:
    """Causal attention in plain torch; the T queries are the last of the S positions."""
    (num_heads, num_tokens, width), num_keys = q_BHTD.shape[1:], k_BKSD.shape[2]
    k, v = (x.repeat_interleave(num_heads // x.shape[1], 1) for x in (k_BKSD, v_BKSD))
    hidden = torch.ones(num_tokens, num_keys, dtype=torch.bool).triu(num_keys - num_tokens + 1)
    scores = (q_BHTD @ k.transpose(2, 3) / math.sqrt(width)).masked_fill(hidden, -math.inf)
    return F.softmax(scores.float(), dim=3).to(v.dtype) @ v
