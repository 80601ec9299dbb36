"""Dense causal attention over a sequence group by a ring: Liu et al., *Ring Attention*, 2023.

Rank r attends to the keys and values of ranks r, r − 1, …, 0, its own first, and merges the results by log-sum-exp, as
flash attention does. It needs none of later ranks, so that the ring is open: rank r sends r + 1 times, and the last
rank never. Supports any numbers of heads, rows of several documents, and padding.

The backward pass passes keys and values on once more. At step s, rank r computes the gradients of the keys and values
of rank r − s, and sends them straight back to it. Autograd keeps q, k, v, the output and its log-sum-exp of this rank.

Shapes: B rows, H query heads, K key-value heads, N positions of a whole row, L of one rank, A of those in a document
that begins on an earlier rank, S keys, D head width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loray.train.attention.attend import attend_heads
from loray.train.attention.segments import AttentionSegments, filled, find_segments, ordered, uniform
from loray.train.sequence.partial import Partial, attend_block, block_gradients, merge
from loray.train.sequence.shard import Pending, SequenceGroup, post


class Continued(NamedTuple):
    """Rows whose first `length` local positions are in a document that begins on an earlier rank, at `start`."""

    rows: list[int] | slice
    start: int
    length: int

    def keys(self, owner: int, rank: int, length: int) -> slice | None:
        """The keys among the `length` of `owner` that `rank` attends to; None where there are none."""
        first, stop = max(0, self.start - owner * length), length if owner < rank else self.length
        return slice(first, stop) if first < stop else None


@dataclass(frozen=True, slots=True, eq=False)
class RingSegments:
    """`local` are the documents that begin on this rank, `continued` the others."""

    group: SequenceGroup
    row_length: int
    continued: tuple[Continued, ...]
    local: AttentionSegments


def segment_ring(document_ids_BN: Tensor, group: SequenceGroup, *, device: torch.device | str = "cpu") -> RingSegments:
    """Find the segments on `group.rank`, from the document ids of whole rows (on the CPU; −1 is padding)."""
    row_length = document_ids_BN.shape[1]
    length = row_length // group.size
    first = group.rank * length
    ids_BL = document_ids_BN[:, first : first + length]
    rows_of: dict[tuple[int, int], list[int]] = {}
    if first:
        is_same_BN = document_ids_BN == ids_BL[:, :1]
        for row, is_same_N in enumerate(is_same_BN):
            if int(ids_BL[row, 0]) >= 0 and bool(is_same_N[first - 1]):
                before, after = is_same_N[:first].flip(0), is_same_N[first : first + length]
                key = first - _leading(before), _leading(after)
                rows_of.setdefault(key, []).append(row)
    num_rows = len(document_ids_BN)
    continued = tuple(Continued(rows if len(rows) < num_rows else slice(None), *k) for k, rows in rows_of.items())
    num_filled = filled(ids_BL)
    if not continued and num_filled is not None:
        return RingSegments(group, row_length, continued, uniform(num_filled, length, 0))
    begin_S, length_S = find_segments(ids_BL, length, 0)
    elsewhere = torch.tensor([row * length for rows in rows_of.values() for row in rows], dtype=torch.long)
    keep_S = ~torch.isin(begin_S, elsewhere)
    return RingSegments(group, row_length, continued, ordered(begin_S[keep_S], length_S[keep_S], device))


def _leading(flags_N: Tensor) -> int:
    """The number of True values before the first False."""
    return int(flags_N.long().cumprod(0).sum())


def ring_attention(
    q_BHLD: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, segments: RingSegments, *, scale: float | None = None
) -> Tensor:
    """Compute attention → (B, L, H, D), in a collective call of `segments.group`, as is its backward pass."""
    repeats = q_BHLD.shape[1] // k_BKLD.shape[1]
    first = _pass_on(torch.stack([k_BKLD.detach(), v_BKLD.detach()]), segments.group.rank, segments.group)
    local_BLHD = None
    if segments.local.buckets or not segments.continued:  # while the neighbour's keys and values are being received
        local_BLHD = attend_heads(q_BHLD, k_BKLD, v_BKLD, segments.local, first=0, repeats=repeats, scale=scale)
    out_BLHD: Tensor = _Ring.apply(q_BHLD, k_BKLD, v_BKLD, local_BLHD, segments, scale, first)  # type: ignore[no-untyped-call]
    return out_BLHD


class _Passing(NamedTuple):
    """Keys and values (2, B, K, L, D) that this rank holds, and those that it will hold next."""

    held: Tensor
    coming: Tensor
    pending: Pending
    nbytes: int


def _pass_on(held: Tensor, owner: int, group: SequenceGroup) -> _Passing:
    """Start to send `owner`'s keys and values to the next rank, and to receive those of the rank before `owner`."""
    sent = {group.rank + 1: held} if group.rank + 1 < group.size else {}
    coming = torch.empty_like(held)
    received = {group.rank - 1: coming} if owner else {}
    return _Passing(held, coming, post(group, sent, received), sum(x.nbytes for x in sent.values()))


class _Ring(torch.autograd.Function):
    """The documents that begin on earlier ranks, written over `local_BLHD`, the result for those that begin here.

    Every rank's output depends on it, and so its backward pass is called on every rank, which the others wait for.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_BHLD: Tensor,
        k_BKLD: Tensor,
        v_BKLD: Tensor,
        local_BLHD: Tensor | None,
        segments: RingSegments,
        scale: float | None,
        first: _Passing,
    ) -> Tensor:
        found = _attend(q_BHLD, segments, scale, first)
        if local_BLHD is None:
            out_BLHD = torch.zeros_like(q_BHLD.transpose(1, 2))
        else:
            out_BLHD = local_BLHD.clone() if found else local_BLHD.view_as(local_BLHD)
        for part, result in zip(segments.continued, found, strict=True):
            out_BLHD[part.rows, : part.length] = result.out.transpose(1, 2).to(out_BLHD.dtype)
        ctx.save_for_backward(q_BHLD, k_BKLD, v_BKLD, out_BLHD, *(result.lse for result in found))
        ctx.segments, ctx.scale, ctx.has_local = segments, scale, local_BLHD is not None
        return out_BLHD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dq_BHLD, dkv = _Backward(ctx.segments, ctx.scale, grads[0], *ctx.saved_tensors).run()
        dk_BKLD, dv_BKLD = dkv.to(dq_BHLD.dtype)
        # The local documents' kernel reads the gradient at their own positions alone.
        return dq_BHLD, dk_BKLD, dv_BKLD, grads[0] if ctx.has_local else None, None, None, None


def _attend(q_BHLD: Tensor, segments: RingSegments, scale: float | None, passing: _Passing) -> list[Partial]:
    """The results for `segments.continued`."""
    group, length = segments.group, q_BHLD.shape[2]
    merged: list[Partial | None] = [None] * len(segments.continued)
    for owner in range(group.rank, -1, -1):
        is_own = owner == group.rank
        held = passing.held
        if not is_own:
            passing = _pass_on(held, owner, group)
        group.traffic.forward_bytes += passing.nbytes
        for i, part in enumerate(segments.continued):
            if keys := part.keys(owner, group.rank, length):
                q_bHAD, (k_bKSD, v_bKSD) = q_BHLD[part.rows, :, : part.length], held[:, part.rows, :, keys]
                merged[i] = merge(merged[i], attend_block(q_bHAD, k_bKSD, v_bKSD, is_own=is_own, scale=scale))
        passing.pending.wait()
        passing = passing._replace(held=passing.coming)
    return [result for result in merged if result is not None]


class _Backward:
    """One backward pass. The sums of gradients are fp32, or fp64 for fp64."""

    def __init__(
        self,
        segments: RingSegments,
        scale: float | None,
        dout_BLHD: Tensor,
        q_BHLD: Tensor,
        k_BKLD: Tensor,
        v_BKLD: Tensor,
        out_BLHD: Tensor,
        *lses: Tensor,
    ) -> None:
        self.segments, self.group, self.scale, self.lses = segments, segments.group, scale, lses
        self.dout_BLHD, self.q_BHLD, self.out_BLHD = dout_BLHD, q_BHLD, out_BLHD
        self.kv = torch.stack([k_BKLD, v_BKLD])
        self.wide = torch.promote_types(q_BHLD.dtype, torch.float32)
        self.dq_BHLD = torch.zeros_like(q_BHLD, dtype=self.wide)
        self.dkv = torch.zeros_like(self.kv, dtype=self.wide)

    def run(self) -> tuple[Tensor, Tensor]:
        """The gradients of this rank's queries, in their dtype, and of its keys and values, as sums."""
        group, held = self.group, self.kv
        arriving, returning = torch.empty_like(held), Pending([], [])
        for step in range(group.size):
            owner, coming, pending = group.rank - step, held, Pending([], [])
            returned = {}
            if owner >= 0:
                _, coming, pending, nbytes = _pass_on(held, owner, group)
                group.traffic.backward_bytes += nbytes
                block = self._block(held, owner)
                if step:
                    returned[owner] = block.to(held.dtype)
                else:
                    self.dkv += block
            self._add(returning, arriving, of_step=step - 1)
            if step:
                received = {group.rank + step: arriving} if group.rank + step < group.size else {}
                group.traffic.backward_bytes += sum(x.nbytes for x in returned.values())
                returning = post(group, returned, received)
            pending.wait()
            held = coming
        self._add(returning, arriving, of_step=group.size - 1)
        return self.dq_BHLD.to(self.q_BHLD.dtype), self.dkv

    def _add(self, returning: Pending, arriving: Tensor, *, of_step: int) -> None:
        """Wait for the gradients of a step, and add those that came from the rank `of_step` further on."""
        returning.wait()
        if of_step > 0 and self.group.rank + of_step < self.group.size:
            self.dkv += arriving

    def _block(self, held: Tensor, owner: int) -> Tensor:
        """Gradients of `owner`'s keys and values (2, B, K, L, D) by this rank's queries, whose own are added up."""
        rank, length = self.group.rank, held.shape[3]
        block = torch.zeros_like(held, dtype=self.wide)
        for part, lse in zip(self.segments.continued, self.lses, strict=True):
            if keys := part.keys(owner, rank, length):
                k_bKSD, v_bKSD = held[:, part.rows, :, keys]
                q_bHAD = self.q_BHLD[part.rows, :, : part.length]
                dout, out = (x[part.rows, : part.length].transpose(1, 2) for x in (self.dout_BLHD, self.out_BLHD))
                found = block_gradients(dout, q_bHAD, k_bKSD, v_bKSD, out, lse, is_own=owner == rank, scale=self.scale)
                self.dq_BHLD[part.rows, :, : part.length] += found.q
                block[:, part.rows, :, keys] += torch.stack([found.k, found.v])
        return block
