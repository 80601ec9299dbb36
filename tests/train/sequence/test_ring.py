"""Dense attention over real ranks against a boolean mask over whole rows, in fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loray.train.sequence import SequenceGroup
from loray.train.sequence.ring import _flash, ring_attention, ring_cuts
from tests.train.attention.test_s2_attention import oracle, oracle_mask
from tests.train.sequence.cases import HEADS, Case, documents, qkv_of
from tests.train.sequence.ranks import Ranks


def compute(group: SequenceGroup, case: Case, scale: float | None) -> tuple[Tensor, int]:
    q, k, v = qkv_of(case, group)
    with torch.no_grad():
        out = ring_attention(q, k, v, ring_cuts(torch.tensor(case.ids_BN), group), scale=scale)
    return out, group.traffic.forward_bytes


@pytest.mark.parametrize("kind", ["full", "padded at the end", "packed and ragged"])
@pytest.mark.parametrize(("heads", "kv_heads"), HEADS)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_equals_full_causal_attention(ranks: Ranks, size: int, heads: int, kv_heads: int, kind: str) -> None:
    case = Case(10, heads, kv_heads, documents(kind, 10 * size))
    parts = ranks(size, compute, case, 0.3)
    ids_BN = torch.tensor(case.ids_BN)
    mask = oracle_mask(len(ids_BN), 1, 10 * size, 20 * size, ids_BN).expand(-1, heads, -1, -1)
    expected = oracle(*qkv_of(case), mask, 0.3).transpose(1, 2)
    torch.testing.assert_close(torch.cat([out for out, _ in parts], dim=1), expected, atol=1e-12, rtol=1e-12)
    block = 2 * len(ids_BN) * kv_heads * 10 * 8 * 8
    assert [sent for _, sent in parts] == [block * (rank + 1) for rank in range(size - 1)] + [0]


def test_bf16_is_near_fp64(ranks: Ranks) -> None:
    case = Case(64, 9, 3, documents("full", 256), torch.bfloat16)
    out = torch.cat([part for part, _ in ranks(4, compute, case, None)], dim=1)
    assert out.dtype == torch.bfloat16
    exact = oracle(*(x.double() for x in qkv_of(case)), oracle_mask(1, 1, 256, 512, None).expand(-1, 9, -1, -1))
    torch.testing.assert_close(out.double(), exact.transpose(1, 2), atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_on_a_gpu(dtype: torch.dtype, is_causal: bool) -> None:
    q, k, v = (torch.randn(3, h, 100, 64, generator=torch.Generator().manual_seed(h)).to(dtype) for h in (2, 1, 1))
    k, v = (x.expand(-1, 2, -1, -1) for x in (k, v))
    out, lse = _flash(q.double(), k.double(), v.double(), is_causal=is_causal, scale=0.1)
    on_gpu = _flash(q.cuda(), k.cuda(), v.cuda(), is_causal=is_causal, scale=0.1)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(on_gpu[0].double().cpu(), out, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(on_gpu[1].double().cpu(), lse, atol=tolerance, rtol=tolerance)
