"""Whole rows that are cut over ranks, and the part of one rank."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loray.train.sequence import SequenceGroup
from tests.fixtures.attention import qkv, runs

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


class Part(NamedTuple):
    """What a rank computes: (B, L, H, D), and gradients of its q, k and v."""

    out: Tensor
    gradients: list[Tensor]
    forward_bytes: int
    backward_bytes: int


def weights_of(num_rows: int, num_tokens: int, heads: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_rows, num_tokens, heads, 8, generator=generator, dtype=torch.float64)


def check(parts: list[Part], out: Tensor, gradients: list[Tensor]) -> None:
    """All ranks' parts together."""
    torch.testing.assert_close(torch.cat([p.out for p in parts], dim=1), out, atol=1e-12, rtol=1e-12)
    for i, gradient in enumerate(gradients):
        got = torch.cat([p.gradients[i] for p in parts], dim=2)
        torch.testing.assert_close(got, gradient, atol=1e-12, rtol=1e-12)
