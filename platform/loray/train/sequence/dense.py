"""Dense attention over ranks by Ulysses: heads are exchanged for tokens.

    q, k, v of all heads and own tokens → those of own heads and all tokens → attention → outputs of own tokens

Attention is that of whole rows, of each head on one rank, so that outputs are those of a single rank to the last bit.
Where the ranks do not divide the heads, some have one more; with more ranks than heads, others have none. Key-value
heads that serve the query heads of several ranks are on each of these, and their gradients are added by the rank that
owns the tokens. A rank holds whole rows of its heads alone: N·(2h + 2k)·D elements a row and layer, of h ≤ ⌈H/P⌉ query
heads with their outputs and the k key-value heads that serve them.

Shapes: B rows, H query heads, K key-value heads, h heads, L positions of this rank, N = P·L of a whole row for P ranks,
D head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from loray.planning.sequence import DensePlan
from loray.train.attention.attend import attend_heads
from loray.train.attention.segments import AttentionSegments, document_segments
from loray.train.sequence.shard import SequenceGroup

_plan = lru_cache(DensePlan)  # the same for every layer


@dataclass(frozen=True, slots=True, eq=False)
class GatheredSegments:
    """`segments` are the documents of whole rows, of `row_length` positions each."""

    group: SequenceGroup
    row_length: int
    segments: AttentionSegments


def segment_gathered(document_ids_BN: Tensor, group: SequenceGroup) -> GatheredSegments:
    """Make segments from the document ids of whole rows (on the CPU; −1 is padding)."""
    return GatheredSegments(group, document_ids_BN.shape[1], document_segments(document_ids_BN))


def ulysses_attention(
    q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, gathered: GatheredSegments, *, scale: float | None = None
) -> Tensor:
    """Compute attention → (B, L, H, D), in a collective call of `gathered.group`."""
    num_heads, num_kv_heads = q_BHLD.shape[1], k_BKLD.shape[1]
    plan, group = _plan(gathered.row_length, gathered.group.size, num_heads, num_kv_heads), gathered.group
    heads = _Heads(*([of(rank) for rank in range(group.size)] for of in (plan.query_heads, plan.kv_heads)))
    q_BhND, k_BhND, v_BhND = _ToHeads.apply(q_BHLD, k_BKLD, v_BKLD, heads, group)  # type: ignore[no-untyped-call]
    first, repeats = heads.query[group.rank].start, num_heads // num_kv_heads
    out_BNhD = q_BhND.transpose(1, 2)  # of a rank without heads
    if q_BhND.shape[1]:
        out_BNhD = attend_heads(q_BhND, k_BhND, v_BhND, gathered.segments, first=first, repeats=repeats, scale=scale)
    out_BHLD: Tensor = _ToTokens.apply(out_BNhD.transpose(1, 2), heads, group)  # type: ignore[no-untyped-call]
    return out_BHLD.transpose(1, 2)


class _Heads(NamedTuple):
    """The heads of each rank."""

    query: list[range]
    kv: list[range]


class _ToHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, heads: _Heads, group: SequenceGroup
    ) -> tuple[Tensor, ...]:
        ctx.heads, ctx.group = heads, group
        parts, nbytes = _to_heads((q_BHLD, k_BKLD, v_BKLD), (heads.query, heads.kv, heads.kv), group)
        group.traffic.forward_bytes += nbytes
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        heads, group = ctx.heads, ctx.group
        parts, nbytes = _to_tokens(grads, (heads.query, heads.kv, heads.kv), group)
        group.traffic.backward_bytes += nbytes
        return (*parts, None, None)


class _ToTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out_BhND: Tensor, heads: _Heads, group: SequenceGroup) -> Tensor:
        ctx.heads, ctx.group = heads, group
        (out_BHLD,), nbytes = _to_tokens((out_BhND,), (heads.query,), group)
        group.traffic.forward_bytes += nbytes
        return out_BHLD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_BhND,), nbytes = _to_heads(grads, (ctx.heads.query,), ctx.group)
        ctx.group.traffic.backward_bytes += nbytes
        return grad_BhND, None, None


def _to_heads(
    parts: Sequence[Tensor], heads: Sequence[list[range]], group: SequenceGroup
) -> tuple[tuple[Tensor, ...], int]:
    """(B, all heads, L, D) each → (B, this rank's heads, N, D) each, and the bytes sent to other ranks."""
    sent = [
        torch.cat([x[:, of[rank].start : of[rank].stop] for x, of in zip(parts, heads, strict=True)], dim=1)
        for rank in range(group.size)
    ]
    received, nbytes = _all_to_all(sent, [sent[group.rank].shape] * group.size, group)
    joined_BhND = torch.cat(received, dim=2)
    return torch.split(joined_BhND, [len(of[group.rank]) for of in heads], dim=1), nbytes


def _to_tokens(parts: Sequence[Tensor], heads: Sequence[list[range]], group: SequenceGroup) -> tuple[list[Tensor], int]:
    """The inverse of `_to_heads`. A head that several ranks hold becomes their sum."""
    sent = torch.cat(list(parts), dim=1).chunk(group.size, dim=2)
    num_rows, _, num_tokens, width = sent[0].shape
    counts = [[len(of[rank]) for of in heads] for rank in range(group.size)]
    shapes = [torch.Size((num_rows, sum(of_rank), num_tokens, width)) for of_rank in counts]
    received, nbytes = _all_to_all(sent, shapes, group)
    wholes = [sent[0].new_zeros(num_rows, num_tokens, of[-1].stop, width).transpose(1, 2) for of in heads]
    for rank, (message, of_rank) in enumerate(zip(received, counts, strict=True)):
        for whole, of, part in zip(wholes, heads, torch.split(message, of_rank, dim=1), strict=True):
            whole[:, of[rank].start : of[rank].stop] += part
    return wholes, nbytes


def _all_to_all(sent: Sequence[Tensor], shapes: Sequence[torch.Size], group: SequenceGroup) -> tuple[list[Tensor], int]:
    """Send `sent[r]` to rank r. Returns a tensor of `shapes[r]` from each rank r, and the bytes that left this rank."""
    if group.size == 1:
        return list(sent), 0
    outgoing = torch.cat([x.reshape(-1) for x in sent])
    sizes = [shape.numel() for shape in shapes]
    incoming = outgoing.new_empty(sum(sizes))
    dist.all_to_all_single(incoming, outgoing, sizes, [x.numel() for x in sent], group=group.process_group)
    received = [x.view(shape) for x, shape in zip(torch.split(incoming, sizes), shapes, strict=True)]
    return received, sum(x.nbytes for rank, x in enumerate(sent) if rank != group.rank)
