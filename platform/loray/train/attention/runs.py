"""Which query heads are computed together, and how their segments become one batch of equal ones.

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
    """Neighbouring query heads and their key-value heads, each of which serves equally many of them."""

    q: slice
    kv: slice
    segments: Segments

    @property
    def repeats(self) -> int:
        """R"""
        return int(self.q.stop - self.q.start) // int(self.kv.stop - self.kv.start)


def split_runs(start: int, stop: int, repeats: int, segments: Segments) -> Iterator[Run]:
    """Cover query heads [start, stop), where `repeats` share a key-value head.

    A key-value head that also serves others, before `start` or from `stop` on, gives a run of its own.
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
    """Positions in the order of segments: all of them as they are, or (1, h, N, D), copied, where a batch is ragged."""
    if segments.order_N is None:
        return x_BhTD
    return x_BhTD.transpose(1, 2).flatten(0, 1).index_select(0, segments.order_N)[None].transpose(1, 2)


def spread(out_BNhD: Tensor, segments: Segments, shape_BhTD: torch.Size) -> Tensor:
    """What was computed of positions that `take` returned, (1, N, h, D) or the first N of each row → (B, T, h, D).

    Positions of no segment are 0.
    """
    num_rows, num_heads, num_tokens, width = shape_BhTD
    if segments.order_N is None:
        return F.pad(out_BNhD, (0, 0, 0, 0, 0, num_tokens - out_BNhD.shape[1]))
    flat = out_BNhD.new_zeros(num_rows * num_tokens, num_heads, width)
    return flat.index_copy(0, segments.order_N, out_BNhD[0]).view(num_rows, num_tokens, num_heads, width)


def num_covered(segments: Segments) -> int:
    """How many of the positions that `take` returns belong to a segment: the first ones."""
    return sum(length * num_segments for length, num_segments in segments.buckets)


class Block(NamedTuple):
    """Segments of equal length, which one call of a kernel computes.

    stretches  (position where the first begins, number) of those that are neighbours
    """

    length: int
    stretches: tuple[tuple[int, int], ...]

    def views(self, taken_BhTD: Tensor, repeats: int) -> Iterator[Tensor]:
        """(B, S, K, R, L, D) of each stretch."""
        for start, num_segments in self.stretches:
            part = taken_BhTD[:, :, start : start + num_segments * self.length]
            num_rows, num_heads, _, width = part.shape
            shape = (num_rows, num_heads // repeats, repeats, num_segments, self.length, width)
            yield part.view(shape).permute(0, 3, 1, 2, 4, 5)

    def fold(self, taken_BhTD: Tensor, repeats: int) -> Tensor:
        """→ (B·ΣS·K, R, L, D), copied: a contiguous matrix a head and segment is what kernels read fastest."""
        return torch.cat(list(self.views(taken_BhTD, repeats)), dim=1).flatten(0, 2)

    def unfold(self, folded: Tensor, num_rows: int) -> tuple[Tensor, ...]:
        """The reverse: (B, S, K, R, L, D) of each stretch."""
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
