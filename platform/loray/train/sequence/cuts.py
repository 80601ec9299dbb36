"""S2-Attn's cuts of the part of a row that one rank holds, halo included. Computed once per batch.

Shapes: B rows, N positions of a whole row, h of a halo, L of this rank, R = h + L of both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from loray.planning.exchange.halo import HaloPlan, check_group_size, group_start
from loray.train.attention.cuts import Bucket, Segments, filled, find_segments, ordered, uniform
from loray.train.sequence.exchange import Halos
from loray.train.sequence.group import SequenceGroup


@dataclass(frozen=True, slots=True, eq=False)
class HalfCuts:
    """The segments of one head half on one rank: those with halo tokens, and those that need no exchange.

    num_halo   h, as in the plan
    num_first  number of first local positions that may share a segment with the halo: those before the first group cut
    first      segments over the halo and these positions, concatenated; None where no segment has tokens of both
    num_apart  number of first local positions that `local` does not cover: 0 or num_first
    local      segments over local positions from num_apart on
    """

    num_halo: int
    num_first: int
    first: Segments | None
    num_apart: int
    local: Segments


@dataclass(frozen=True, slots=True, eq=False)
class ShardCuts:
    """The cuts of a batch, for the attention of every layer. `halos` keeps each layer's for its recomputation."""

    group: SequenceGroup
    row_length: int
    group_size: int
    plain: HalfCuts
    shifted: HalfCuts
    keep_halos: bool = True
    halos: dict[int, Halos] = field(default_factory=dict)

    def plan(self, num_heads: int, num_kv_heads: int) -> HaloPlan:
        return _plan(self.row_length, self.group.size, self.group_size, num_heads, num_kv_heads)


_plan = lru_cache(HaloPlan)  # the same for every layer


def shard_cuts(
    document_ids_BN: Tensor,
    group: SequenceGroup,
    group_size: int,
    *,
    keep_halos: bool = True,
    device: torch.device | str = "cpu",
) -> ShardCuts:
    """Cuts on `group.rank`, from the document ids of whole rows (on the CPU; −1 is padding).

    A document is a run of equal ids in a row, and may extend over several ranks. Raises ValueError for an odd group.
    """
    check_group_size(group_size)
    row_length = document_ids_BN.shape[1]
    start = group.rank * (row_length // group.size)
    stop = start + row_length // group.size

    def half(offset: int) -> HalfCuts:
        ids_BR = document_ids_BN[:, group_start(start, group_size, offset) : stop]
        return _half(ids_BR, stop - start, group_size, (offset - start) % group_size, device)

    return ShardCuts(group, row_length, group_size, half(0), half(group_size // 2), keep_halos)


def _half(ids_BR: Tensor, length: int, group_size: int, to_cut: int, device: torch.device | str) -> HalfCuts:
    """`to_cut` is the number of local positions, of `length`, before the first group cut."""
    num_halo = ids_BR.shape[1] - length
    num_filled = filled(ids_BR)
    if num_filled is None:
        return _ragged(ids_BR, num_halo, min(to_cut, length), group_size, to_cut, device)
    num_real = max(0, num_filled - num_halo)
    if not num_halo:
        return HalfCuts(0, 0, None, 0, uniform(num_real, group_size, to_cut))
    num_first = min(to_cut, num_real)
    first = Segments((Bucket(num_halo + num_first, 1),)) if num_first else None
    return HalfCuts(num_halo, num_first, first, num_first, uniform(num_real - num_first, group_size, 0))


def _ragged(
    ids_BR: Tensor, num_halo: int, num_first: int, group_size: int, to_cut: int, device: torch.device | str
) -> HalfCuts:
    num_columns = ids_BR.shape[1]
    begin_S, length_S = find_segments(ids_BR, group_size, (num_halo + to_cut) % group_size)
    row_S, column_S = begin_S // num_columns, begin_S % num_columns
    is_local_S = column_S >= num_halo
    local_S = row_S * (num_columns - num_halo) + column_S - num_halo
    local = ordered(local_S[is_local_S], length_S[is_local_S], device)
    is_both_S = ~is_local_S & (column_S + length_S > num_halo)
    first_S = row_S * (num_halo + num_first) + column_S
    first = ordered(first_S[is_both_S], length_S[is_both_S], device) if bool(is_both_S.any()) else None
    return HalfCuts(num_halo, num_first, first, 0, local)
