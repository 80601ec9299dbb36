"""S2-Attn over real ranks against its definition on whole rows: a boolean mask, softmax in fp64."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from loray.planning.halo import HaloPlan, closed_form_elements
from loray.train.sequence import SequenceGroup
from loray.train.sequence.attention import attend_shard
from loray.train.sequence.cuts import shard_cuts
from tests.train.sequence.ranks import Ranks
from tests.train.test_s2_attention import oracle, oracle_mask, qkv, runs

GROUP = 16
LENGTHS = {"2G": 32, "G": 16, "3G/2": 24, "G/2": 8, "G/4": 4, "5G/8": 10}
HEADS = [(9, 3), (8, 2), (8, 8), (3, 1), (1, 1)]


class Case(NamedTuple):
    length: int
    heads: int
    kv_heads: int
    ids_BN: list[list[int]]
    dtype: torch.dtype = torch.float64


class Part(NamedTuple):
    """What a rank computes: (B, L, H, D), and gradients of its q, k and v."""

    out: Tensor
    gradients: list[Tensor]
    forward_bytes: int
    backward_bytes: int


def documents(kind: str, num_tokens: int) -> list[list[int]]:
    if kind == "full":
        return [[0] * num_tokens]
    if kind == "padded at the end":  # as a row that does not divide by the ranks
        return [runs((0, num_tokens - 3), (-1, 3))] * 2
    half, third = num_tokens // 2, num_tokens // 3
    return [
        runs((0, third), (1, num_tokens - third)),  # packed, across every boundary
        runs((4, half), (5, 1), (4, num_tokens - half - 1)),  # cut where ranks meet; an id that comes back
        runs((0, third + 1), (-1, num_tokens - third - 1)),  # ranks of padding alone
        runs((0, 2), (-1, num_tokens - 2)),  # shorter than half a group
    ]


def weights_of(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def compute(group: SequenceGroup, case: Case, change: int | None = None) -> Part:
    ids_BN = torch.tensor(case.ids_BN)
    own = slice(group.rank * case.length, (group.rank + 1) * case.length)
    whole = [x.detach() for x in qkv(ids_BN.shape[0], case.heads, case.kv_heads, ids_BN.shape[1], case.dtype)]
    if change is not None:
        for x in whole:
            x[:, :, change] += 3
    q, k, v = (x[:, :, own].clone().requires_grad_() for x in whole)
    cuts = shard_cuts(ids_BN, group, GROUP)
    out = attend_shard(q, k, v, cuts, layer=0)
    weights_BNHD = weights_of(torch.Size([len(case.ids_BN), ids_BN.shape[1], case.heads, 8])).to(case.dtype)
    (out * weights_BNHD[:, own]).sum().backward()
    gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in (q, k, v)]
    return Part(out.detach(), gradients, group.traffic.forward_bytes, group.traffic.backward_bytes)


def expected(case: Case) -> tuple[Tensor, list[Tensor]]:
    ids_BN = torch.tensor(case.ids_BN)
    num_rows, num_tokens = ids_BN.shape
    halves = oracle_mask(num_rows, 2, num_tokens, GROUP, ids_BN)
    mask = halves[:, [0] * (case.heads // 2) + [1] * (case.heads - case.heads // 2)]
    q, k, v = qkv(num_rows, case.heads, case.kv_heads, num_tokens)
    out = oracle(q, k, v, mask).transpose(1, 2)
    (out * weights_of(out.shape)).sum().backward()
    return out.detach(), [x.grad for x in (q, k, v) if x.grad is not None]


@pytest.mark.parametrize("kind", ["full", "padded at the end", "packed and ragged"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("length", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("size", [1, 2, 4])
def test_output_gradients_and_bytes(
    ranks: Ranks, size: int, length: int, heads: int, kv_heads: int, kind: str
) -> None:
    case = Case(length, heads, kv_heads, documents(kind, size * length))
    parts: list[Part] = ranks(size, compute, case)
    out, gradients = expected(case)
    torch.testing.assert_close(torch.cat([p.out for p in parts], dim=1), out, atol=1e-12, rtol=1e-12)
    for i, gradient in enumerate(gradients):
        got = torch.cat([p.gradients[i] for p in parts], dim=2)
        torch.testing.assert_close(got, gradient, atol=1e-12, rtol=1e-12)

    plan = HaloPlan(size * length, size, GROUP, heads, kv_heads)
    for rank, part in enumerate(parts):
        assert part.forward_bytes == 8 * plan.elements_sent(rank, 8, num_rows=len(case.ids_BN))
        assert part.backward_bytes == 8 * plan.elements_received(rank, 8, num_rows=len(case.ids_BN))
