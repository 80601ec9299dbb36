"""Whole rows that are cut over ranks, and the part of one rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loray.train.sequence import SequenceGroup
from tests.train.attention.test_s2_attention import qkv, runs

HEADS = [(9, 3), (8, 2), (8, 8), (3, 1), (1, 1)]


class Case(NamedTuple):
    """`length` tokens of each row on each rank."""

    length: int
    heads: int
    kv_heads: int
    ids_BN: list[list[int]]
    dtype: torch.dtype = torch.float64


def documents(kind: str, num_tokens: int) -> list[list[int]]:
    if kind == "full":
        return [[0] * num_tokens]
    if kind == "padded at the end":  # rows whose length does not divide by the ranks
        return [runs((0, num_tokens - 3), (-1, 3))] * 2
    half, third = num_tokens // 2, num_tokens // 3
    return [
        runs((0, third), (1, num_tokens - third)),  # packed, across every boundary
        runs((4, half), (5, 1), (4, num_tokens - half - 1)),  # cut where ranks meet; an id that comes back
        runs((0, third + 1), (-1, num_tokens - third - 1)),  # ranks of padding alone
        runs((0, 2), (-1, num_tokens - 2)),  # shorter than half a group
    ]


def qkv_of(case: Case, group: SequenceGroup | None = None) -> list[Tensor]:
    """Of whole rows, or the part of a rank. (B, heads, tokens, 8), leaves without gradients."""
    whole = qkv(len(case.ids_BN), case.heads, case.kv_heads, len(case.ids_BN[0]), case.dtype)
    own = slice(None) if group is None else slice(group.rank * case.length, (group.rank + 1) * case.length)
    return [x.detach()[:, :, own].clone() for x in whole]
