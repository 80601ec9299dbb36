"""Runs of query heads that are computed together, and batches of segments of equal length.

Shapes: B rows, T positions, h heads, which are K key-value heads with R query heads each (K = h, R = 1 for keys and
values), S segments of L positions, N positions of all segments, D head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from loray.train.attention.cuts import Segments


class Run(NamedTuple):
    """Neighbouring query heads and their key-value heads. Each of these serves equally many of the query heads."""

    q: slice
    kv: slice
    segments: Segments

    @property
    def repeats(self) -> int:
        """R"""
        return int(self.q.stop - self.q.start) // int(self.kv.stop - self.kv.start)


def split_runs(start: int, stop: int, repeats: int, segments: Segments) -> Iterator[Run]:
    """Runs that cover the query heads [start, stop). `repeats` query heads share a key-value head.

    A key-value head that also serves query heads before `start` or from `stop` on is a run of its own.
    """
    while start < stop:
        kv = start // repeats
        if start % repeats or stop - start < repeats:
            end, kv_end = min(stop, (kv + 1) * repeats), kv + 1
        else:
            kv_end = stop // repeats
            end = kv_end * repeats
        yield Run(slice(start, end), slice(kv, kv_end), segments)
        start = end


def take(x_BhTD: Tensor, segments: Segments) -> Tensor:
    """Positions in the order of segments: `x_BhTD` itself, or a copy (1, h, N, D) where `order_N` is given."""
    if segments.order_N is None:
        return x_BhTD
    return x_BhTD.transpose(1, 2).flatten(0, 1).index_select(0, segments.order_N)[None].transpose(1, 2)


def spread(out_BNhD: Tensor, segments: Segments, shape_BhTD: torch.Size) -> Tensor:
    """Results for the positions that `take` returned, (1, N, h, D) or the first N of each row → (B, T, h, D).

    Positions outside of all segments are 0.
    """
    num_rows, num_heads, num_tokens, width = shape_BhTD
    if segments.order_N is None:
        return F.pad(out_BNhD, (0, 0, 0, 0, 0, num_tokens - out_BNhD.shape[1]))
    flat = out_BNhD.new_zeros(num_rows * num_tokens, num_heads, width)
    return flat.index_copy(0, segments.order_N, out_BNhD[0]).view(num_rows, num_tokens, num_heads, width)


def num_covered(segments: Segments) -> int:
    """The number of positions in segments. They are the first ones that `take` returns."""
    return sum(length * num_segments for length, num_segments in segments.buckets)


class Block(NamedTuple):
    """Segments of equal length, which one kernel call computes.

    stretches  (first position, number of segments) of segments that are neighbours
    """

    length: int
    stretches: tuple[tuple[int, int], ...]

    def views(self, taken_BhTD: Tensor, repeats: int) -> Iterator[Tensor]:
        """A view (B, S, K, R, L, D) of each stretch."""
        for start, num_segments in self.stretches:
            part = taken_BhTD[:, :, start : start + num_segments * self.length]
            num_rows, num_heads, _, width = part.shape
            shape = (num_rows, num_heads // repeats, repeats, num_segments, self.length, width)
            yield part.view(shape).permute(0, 3, 1, 2, 4, 5)

    def fold(self, taken_BhTD: Tensor, repeats: int) -> Tensor:
        """→ a copy (B·ΣS·K, R, L, D): kernels are fastest on contiguous matrices per head and segment."""
        return torch.cat(list(self.views(taken_BhTD, repeats)), dim=1).flatten(0, 2)

    def unfold(self, folded: Tensor, num_rows: int) -> tuple[Tensor, ...]:
        """The inverse of `fold`: (B, S, K, R, L, D) of each stretch."""
        counts = [num_segments for _, num_segments in self.stretches]
        parts = folded.view(num_rows, sum(counts), -1, *folded.shape[1:])
        return torch.split(parts, counts, dim=1)


def blocks(segments: Segments) -> list[Block]:
    stretches: dict[int, list[tuple[int, int]]] = {}
    at = 0
    for length, num_segments in segments.buckets:
        stretches.setdefault(length, []).append((at, num_segments))
        at += length * num_segments
    return [Block(length, tuple(found)) for length, found in stretches.items()]
