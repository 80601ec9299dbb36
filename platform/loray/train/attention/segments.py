"""Cuts a batch into segments of causal attention, and query heads into groups that share key-value heads.

Chen et al., *LongLoRA* (ICLR 2024), section 3.2, without its wrap-around. A row is cut at the group cuts, counted from
its first column, and at document boundaries. Segments contain no padding.

Shapes: B rows, T positions of a row, N = B·T positions of the batch, row after row; D head width; h heads, which are K
key-value heads with R query heads each (K = h, R = 1 for keys and values); S segments of L positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from loray.planning.sequence import check_group_size


@dataclass(frozen=True, slots=True, eq=False)
class AttentionSegments:
    """The segments of causal attention: [begin, begin + length) of the N positions of a batch, in order, on the CPU."""

    begins_S: Tensor
    lengths_S: Tensor

    @property
    def num_covered(self) -> int:
        """The number of positions in segments; the others are padding."""
        return int(self.lengths_S.sum())


@dataclass(frozen=True, slots=True, eq=False)
class BatchSegments:
    """The segments of the plain and of the shifted query heads. `document_ids_BT` None: each row is one document."""

    plain: AttentionSegments
    shifted: AttentionSegments
    document_ids_BT: Tensor | None = None


def segment_batch(
    num_rows: int, num_tokens: int, group_size: int, *, document_ids_BT: Tensor | None = None
) -> BatchSegments:
    """Cut a batch of `num_rows` rows of `num_tokens` positions.

    A document is a run of equal ids in one row: an id that appears again after another one is a new document. A
    negative id is padding. Plain heads are cut at 0, G, 2G, …, shifted heads at 0, G/2, 3G/2, …, so that their first
    and last groups are shorter. Raises ValueError for an odd group or ids of another shape.
    """
    check_group_size(group_size)
    if document_ids_BT is not None and document_ids_BT.shape != (num_rows, num_tokens):
        shape = tuple(document_ids_BT.shape)
        raise ValueError(f"document ids have shape {shape}, the batch has {(num_rows, num_tokens)}")
    ids_BT = torch.zeros(num_rows, num_tokens) if document_ids_BT is None else document_ids_BT.detach().cpu()
    plain, shifted = (find_segments(ids_BT, group_size, offset) for offset in (0, group_size // 2))
    return BatchSegments(plain, shifted, document_ids_BT)


def document_segments(document_ids_BT: Tensor) -> AttentionSegments:
    """Make each document one segment, for dense causal attention. Documents and padding are as in `segment_batch`."""
    return find_segments(document_ids_BT.detach().cpu(), document_ids_BT.shape[1], 0)


def find_segments(ids_BT: Tensor, group_size: int, offset: int) -> AttentionSegments:
    """Cut rows at offset, offset + G, … and where the id changes. Padding is in no segment."""
    num_rows, num_tokens = ids_BT.shape
    starts_BT = ((torch.arange(num_tokens) - offset) % group_size == 0).repeat(num_rows, 1)
    starts_BT[:, 1:] |= ids_BT[:, 1:] != ids_BT[:, :-1]
    starts_BT[:, :1] = True
    begins_S = starts_BT.flatten().nonzero().squeeze(1)
    lengths_S = torch.diff(begins_S, append=begins_S.new_tensor([num_rows * num_tokens]))
    is_real_S = ids_BT.flatten()[begins_S] >= 0
    return AttentionSegments(begins_S[is_real_S], lengths_S[is_real_S])


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


class Block(NamedTuple):
    """Positions of segments, S of `length` positions each where one kernel call computes them: a slice where they are
    neighbours, which is a view of a tensor, else their numbers.
    """

    length: int
    positions: slice | Tensor

    def take(self, x_NhD: Tensor) -> Tensor:
        """Take the positions: (S·L, h, D)."""
        if isinstance(self.positions, slice):
            return x_NhD[self.positions]
        return x_NhD.index_select(0, self.positions)

    def fold(self, x_NhD: Tensor, repeats: int) -> Tensor:
        """Copy the segments into (S·K, R, L, D): kernels are fastest on contiguous matrices per head and segment."""
        return self._split(self.take(x_NhD), repeats).permute(0, 2, 3, 1, 4).flatten(0, 1).contiguous()

    def unfold(self, folded: Tensor, num_heads: int) -> Tensor:
        """Invert `fold`: (S·L, h, D)."""
        return self._unfolded(folded, num_heads).reshape(-1, num_heads, folded.shape[-1])

    def put(self, x_NhD: Tensor, folded: Tensor) -> None:
        """Write values, as `fold` returns them, to their positions."""
        if isinstance(self.positions, slice):
            place = self._split(x_NhD[self.positions], folded.shape[1])
            place.copy_(self._unfolded(folded, x_NhD.shape[1]))
        else:
            x_NhD.index_copy_(0, self.positions, self.unfold(folded, x_NhD.shape[1]))

    def add(self, x_NhD: Tensor, folded: Tensor) -> None:
        """Add values to those at their positions."""
        if isinstance(self.positions, slice):
            place = self._split(x_NhD[self.positions], folded.shape[1])
            place += self._unfolded(folded, x_NhD.shape[1])
        else:
            x_NhD.index_add_(0, self.positions, self.unfold(folded, x_NhD.shape[1]))

    def _split(self, taken: Tensor, repeats: int) -> Tensor:
        """View (S·L, h, D) as (S, L, K, R, D)."""
        num_positions, num_heads, width = taken.shape
        return taken.view(num_positions // self.length, self.length, num_heads // repeats, repeats, width)

    def _unfolded(self, folded: Tensor, num_heads: int) -> Tensor:
        """View (S·K, R, L, D) as (S, L, K, R, D)."""
        num_heads //= folded.shape[1]
        return folded.view(len(folded) // num_heads, num_heads, *folded.shape[1:]).permute(0, 3, 1, 2, 4)


@lru_cache(maxsize=16)  # the plain and the shifted segments of a batch and of a shard, for each of its layers
def blocks(segments: AttentionSegments, device: torch.device) -> tuple[Block, ...]:
    """Join the segments of equal length."""
    found = []
    for length in sorted(set(segments.lengths_S.tolist())):
        begins_S = segments.begins_S[segments.lengths_S == length]
        found.append(Block(length, _positions((begins_S[:, None] + torch.arange(length)).flatten(), device)))
    return tuple(found)


def _positions(positions_N: Tensor, device: torch.device) -> slice | Tensor:
    """A slice where the positions, which are in order, are neighbours."""
    if not len(positions_N):
        return slice(0, 0)
    first, last = int(positions_N[0]), int(positions_N[-1])
    return slice(first, last + 1) if last - first + 1 == len(positions_N) else positions_N.to(device)
