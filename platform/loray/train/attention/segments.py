"""Cuts a batch into segments of causal attention, and query heads into groups that share key-value heads.

Chen et al., *LongLoRA* (ICLR 2024), section 3.2, without its wrap-around. A row is cut at the group cuts, counted from
its first column, and at document boundaries. Segments contain no padding.

Shapes: B rows, T positions of a row, D head width; h heads, which are K key-value heads with R query heads each (K = h,
R = 1 for keys and values); S segments of L positions, N positions of all segments.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loray.planning.sequence import check_group_size


class Bucket(NamedTuple):
    """`num_segments` neighbouring segments of `length` positions each, which are computed as one batch."""

    length: int
    num_segments: int


@dataclass(frozen=True, slots=True, eq=False)
class AttentionSegments:
    """The segments of causal attention.

    buckets  in order; they cover the first positions of a row (order_N None), or the entries of order_N
    order_N  None: every row has the same segments, in the order of its positions. Otherwise positions of the whole
             batch without padding, sorted so that segments of equal length are neighbours
    """

    buckets: tuple[Bucket, ...]
    order_N: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class BatchSegments:
    """The segments of the plain and of the shifted query heads. `document_ids_BT` None: each row is one document."""

    plain: AttentionSegments
    shifted: AttentionSegments
    document_ids_BT: Tensor | None = None


def segment_batch(
    num_rows: int,
    num_tokens: int,
    group_size: int,
    *,
    document_ids_BT: Tensor | None = None,
    device: torch.device | str = "cpu",
) -> BatchSegments:
    """Cut a batch of `num_rows` rows of `num_tokens` positions.

    A document is a run of equal ids in one row: an id that appears again after another one is a new document. A
    negative id is padding. Plain heads are cut at 0, G, 2G, …, shifted heads at 0, G/2, 3G/2, …, so that their first
    and last groups are shorter. Raises ValueError for an odd group or ids of another shape.
    """
    check_group_size(group_size)
    offsets = (0, group_size // 2)
    if document_ids_BT is None:
        plain, shifted = (uniform(num_tokens, group_size, offset) for offset in offsets)
        return BatchSegments(plain, shifted)
    if document_ids_BT.shape != (num_rows, num_tokens):
        shape = tuple(document_ids_BT.shape)
        raise ValueError(f"document ids have shape {shape}, the batch has {(num_rows, num_tokens)}")
    ids_BT = document_ids_BT.detach().cpu()
    num_filled = filled(ids_BT)
    if num_filled is None:
        plain, shifted = (ordered(*find_segments(ids_BT, group_size, offset), device) for offset in offsets)
    else:
        plain, shifted = (uniform(num_filled, group_size, offset) for offset in offsets)
    return BatchSegments(plain, shifted, None if num_filled == num_tokens else document_ids_BT)


def document_segments(document_ids_BT: Tensor, *, device: torch.device | str = "cpu") -> AttentionSegments:
    """Make each document one segment, for dense causal attention. Documents and padding are as in `segment_batch`."""
    ids_BT = document_ids_BT.detach().cpu()
    num_filled = filled(ids_BT)
    if num_filled is None:
        return ordered(*find_segments(ids_BT, ids_BT.shape[1], 0), device)
    return uniform(num_filled, ids_BT.shape[1], 0)


def filled(ids_BT: Tensor) -> int | None:
    """Find n such that each row is one document of n columns, then padding. None for any other batch."""
    real_BT = ids_BT >= 0
    num_filled = int(real_BT[0].sum())
    one_document = ids_BT[:, :num_filled] == ids_BT[:, :1]
    is_filled = bool((one_document & real_BT[:, :num_filled]).all()) and not bool(real_BT[:, num_filled:].any())
    return num_filled if is_filled else None


def uniform(num_tokens: int, group_size: int, offset: int) -> AttentionSegments:
    """Make the segments of rows whose first `num_tokens` positions are one document, cut at offset, offset + G, …"""
    first = min(offset, num_tokens)
    num_groups, last = divmod(num_tokens - first, group_size)
    buckets = (Bucket(first, 1), Bucket(group_size, num_groups), Bucket(last, 1))
    return AttentionSegments(tuple(b for b in buckets if b.length and b.num_segments))


def find_segments(ids_BT: Tensor, group_size: int, offset: int) -> tuple[Tensor, Tensor]:
    """Find first position in the batch and length of each segment (S). Padding is in no segment."""
    num_rows, num_tokens = ids_BT.shape
    starts_BT = ((torch.arange(num_tokens) - offset) % group_size == 0).repeat(num_rows, 1)
    starts_BT[:, 1:] |= ids_BT[:, 1:] != ids_BT[:, :-1]
    starts_BT[:, :1] = True
    begin_S = starts_BT.flatten().nonzero().squeeze(1)
    length_S = torch.diff(begin_S, append=begin_S.new_tensor([num_rows * num_tokens]))
    real_S = ids_BT.flatten()[begin_S] >= 0
    return begin_S[real_S], length_S[real_S]


def ordered(begin_S: Tensor, length_S: Tensor, device: torch.device | str) -> AttentionSegments:
    """Make segments at any positions of the batch, sorted by length."""
    by_length_S = length_S.argsort(stable=True)
    begin_S, length_S = begin_S[by_length_S], length_S[by_length_S]
    # Position = running number + (segment's first position − running number of its first entry).
    shift_S = begin_S - (length_S.cumsum(0) - length_S)
    order_N = torch.arange(int(length_S.sum())) + shift_S.repeat_interleave(length_S)
    lengths, counts = torch.unique_consecutive(length_S, return_counts=True)
    buckets = tuple(Bucket(*pair) for pair in zip(lengths.tolist(), counts.tolist(), strict=True))
    return AttentionSegments(buckets, order_N.to(device))


class HeadGroup(NamedTuple):
    """Neighbouring query heads and their key-value heads. Each of these serves equally many of the query heads."""

    q: slice
    kv: slice
    segments: AttentionSegments

    @property
    def repeats(self) -> int:
        """R, the query heads of a key-value head."""
        return int(self.q.stop - self.q.start) // int(self.kv.stop - self.kv.start)


def split_heads(start: int, stop: int, repeats: int, segments: AttentionSegments) -> Iterator[HeadGroup]:
    """Split the query heads [start, stop), of which `repeats` share a key-value head, into groups.

    A key-value head that also serves query heads before `start` or from `stop` on is a group of its own.
    """
    while start < stop:
        kv = start // repeats
        if start % repeats or stop - start < repeats:
            end, kv_end = min(stop, (kv + 1) * repeats), kv + 1
        else:
            kv_end = stop // repeats
            end = kv_end * repeats
        yield HeadGroup(slice(start, end), slice(kv, kv_end), segments)
        start = end


def take(x_BhTD: Tensor, segments: AttentionSegments) -> Tensor:
    """Take positions in the order of segments: `x_BhTD` itself, or a copy (1, h, N, D) where `order_N` is given."""
    if segments.order_N is None:
        return x_BhTD
    return x_BhTD.transpose(1, 2).flatten(0, 1).index_select(0, segments.order_N)[None].transpose(1, 2)


def spread(out_BNhD: Tensor, segments: AttentionSegments, shape_BhTD: torch.Size) -> Tensor:
    """Spread results for the positions that `take` returned, (1, N, h, D) or the first N of each row → (B, T, h, D).

    Positions outside of all segments are 0.
    """
    num_rows, num_heads, num_tokens, width = shape_BhTD
    if segments.order_N is None:
        return F.pad(out_BNhD, (0, 0, 0, 0, 0, num_tokens - out_BNhD.shape[1]))
    flat = out_BNhD.new_zeros(num_rows * num_tokens, num_heads, width)
    return flat.index_copy(0, segments.order_N, out_BNhD[0]).view(num_rows, num_tokens, num_heads, width)


def num_covered(segments: AttentionSegments) -> int:
    """The number of positions in segments. They are the first ones that `take` returns."""
    return sum(length * num_segments for length, num_segments in segments.buckets)


class Block(NamedTuple):
    """Segments of equal length, which one kernel call computes.

    stretches  (first position, number of segments) of segments that are neighbours
    """

    length: int
    stretches: tuple[tuple[int, int], ...]

    def views(self, taken_BhTD: Tensor, repeats: int) -> Iterator[Tensor]:
        """View each stretch as (B, S, K, R, L, D)."""
        for start, num_segments in self.stretches:
            part = taken_BhTD[:, :, start : start + num_segments * self.length]
            num_rows, num_heads, _, width = part.shape
            shape = (num_rows, num_heads // repeats, repeats, num_segments, self.length, width)
            yield part.view(shape).permute(0, 3, 1, 2, 4, 5)

    def fold(self, taken_BhTD: Tensor, repeats: int) -> Tensor:
        """Copy the segments into (B·ΣS·K, R, L, D): kernels are fastest on contiguous matrices per head and segment."""
        return torch.cat(list(self.views(taken_BhTD, repeats)), dim=1).flatten(0, 2)

    def unfold(self, folded: Tensor, num_rows: int) -> tuple[Tensor, ...]:
        """Invert `fold`: (B, S, K, R, L, D) of each stretch."""
        counts = [num_segments for _, num_segments in self.stretches]
        parts = folded.view(num_rows, sum(counts), -1, *folded.shape[1:])
        return torch.split(parts, counts, dim=1)


def blocks(segments: AttentionSegments) -> list[Block]:
    """Join the segments of equal length."""
    stretches: dict[int, list[tuple[int, int]]] = {}
    at = 0
    for length, num_segments in segments.buckets:
        stretches.setdefault(length, []).append((at, num_segments))
        at += length * num_segments
    return [Block(length, tuple(found)) for length, found in stretches.items()]
