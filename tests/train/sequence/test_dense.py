"""Dense attention over real ranks, by Ulysses and by a ring, against a boolean mask over whole rows, in fp64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loray.planning.sequence import DenseExchange, DensePlan
from loray.train.sequence import SentBytes, SequenceGroup
from loray.train.sequence.dense import segment_gathered, ulysses_attention
from loray.train.sequence.partial import flash, flash_gradients
from loray.train.sequence.ring import ring_attention, segment_ring
from tests.fixtures.attention import oracle, oracle_mask
from tests.fixtures.ranks import Ranks
from tests.train.sequence.cases import HEADS, Case, Part, check, documents, qkv_of, weights_of

KINDS = ["full", "padded at the end", "packed and ragged"]
SCALE = 0.3
# Equal shares; one key-value head for several ranks; one that serves query heads of two ranks and others of one.
ULYSSES = [(8, 8), (8, 2), (4, 1), (12, 3)]


def attend(group: SequenceGroup, exchange: DenseExchange, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    ids_BN = torch.tensor(case.ids_BN)
    if exchange == "ring":
        return ring_attention(q, k, v, segment_ring(ids_BN, group), scale=SCALE)
    return ulysses_attention(q, k, v, segment_gathered(ids_BN, group), scale=SCALE)


def compute(group: SequenceGroup, exchange: DenseExchange, cases: Sequence[Case]) -> list[Part]:
    """Forward and backward."""
    parts = []
    for case in cases:
        counted = replace(group, traffic=SentBytes())
        q, k, v = (x.requires_grad_() for x in qkv_of(case, group))
        out = attend(counted, exchange, case, q, k, v)
        first, sent = group.rank * case.length, counted.traffic
        weights_BLHD = weights_of(len(q), group.size * case.length, case.heads)[:, first : first + case.length]
        (out * weights_BLHD.to(case.dtype)).sum().backward()
        gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in (q, k, v)]
        parts.append(Part(out.detach(), gradients, sent.forward_bytes, sent.backward_bytes))
    return parts


def expected(case: Case) -> tuple[Tensor, list[Tensor]]:
    num_rows, num_tokens = len(case.ids_BN), len(case.ids_BN[0])
    mask = oracle_mask(num_rows, 1, num_tokens, 2 * num_tokens, torch.tensor(case.ids_BN))
    q, k, v = (x.double().requires_grad_() for x in qkv_of(case))
    out = oracle(q, k, v, mask.expand(-1, case.heads, -1, -1), SCALE).transpose(1, 2)
    (out * weights_of(*out.shape[:3])).sum().backward()
    return out.detach(), [x.grad for x in (q, k, v) if x.grad is not None]


@pytest.mark.parametrize(
    ("exchange", "heads", "kv_heads"),
    [*(("ring", *heads) for heads in HEADS), *(("ulysses", *heads) for heads in ULYSSES)],
)
@pytest.mark.parametrize("size", [1, 2, 4])
def test_output_gradients_and_bytes(
    ranks: Ranks, size: int, exchange: DenseExchange, heads: int, kv_heads: int
) -> None:
    cases = [Case(10, heads, kv_heads, documents(kind, 10 * size)) for kind in KINDS]
    of_ranks: list[list[Part]] = ranks(size, compute, exchange, cases)
    for case, parts in zip(cases, zip(*of_ranks, strict=True), strict=True):
        check(list(parts), *expected(case))
        plan, num_rows = DensePlan(10 * size, size, heads, kv_heads), len(case.ids_BN)
        if plan.exchange == exchange:
            assert [p.forward_bytes for p in parts] == [8 * plan.forward_elements(r, 8, num_rows) for r in range(size)]
            assert [p.backward_bytes for p in parts] == [
                8 * plan.backward_elements(r, 8, num_rows) for r in range(size)
            ]


@pytest.mark.parametrize("exchange", ["ring", "ulysses"])
def test_bf16_is_near_fp64(ranks: Ranks, exchange: DenseExchange) -> None:
    case = Case(64, 8, 2, documents("full", 256), torch.bfloat16)
    parts = [part for (part,) in ranks(4, compute, exchange, [case])]
    out, gradients = expected(case)
    assert {p.out.dtype for p in parts} == {torch.bfloat16}
    torch.testing.assert_close(torch.cat([p.out for p in parts], dim=1).double(), out, atol=2e-2, rtol=2e-2)
    for i, gradient in enumerate(gradients):
        got = torch.cat([p.gradients[i] for p in parts], dim=2).double()
        assert torch.linalg.vector_norm(got - gradient) <= 1e-2 * torch.linalg.vector_norm(gradient)


def only_values(group: SequenceGroup, exchange: DenseExchange, case: Case) -> Tensor | None:
    q, k, v = qkv_of(case, group)
    v.requires_grad_()
    attend(group, exchange, case, q, k, v).square().sum().backward()
    return v.grad


@pytest.mark.parametrize("exchange", ["ring", "ulysses"])
def test_values_alone_may_be_trained(ranks: Ranks, exchange: DenseExchange) -> None:
    """As in the first layer of a model with adapters on v_proj."""
    case = Case(16, 4, 2, documents("full", 32))
    q, k, v = qkv_of(case)
    mask = oracle_mask(1, 1, 32, 64, None).expand(-1, 4, -1, -1)
    oracle(q, k, v.requires_grad_(), mask, SCALE).square().sum().backward()
    got = torch.cat(ranks(2, only_values, exchange, case), dim=2)
    torch.testing.assert_close(got, v.grad, atol=1e-12, rtol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_block_on_a_gpu(dtype: torch.dtype, is_causal: bool) -> None:
    q, k, v, dout = (
        torch.randn(3, h, 100, 64, generator=torch.Generator().manual_seed(i)).to(dtype)
        for i, h in enumerate((2, 1, 1, 2))
    )
    k, v = (x.expand(-1, 2, -1, -1) for x in (k, v))
    options = {"is_causal": is_causal, "scale": 0.1}
    out, lse = flash(q.double(), k.double(), v.double(), **options)
    exact = flash_gradients(dout.double(), q.double(), k.double(), v.double(), out, lse, **options)
    there = [x.cuda() for x in (q, k, v)]
    on_gpu = flash(*there, **options)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    for got, right in zip(on_gpu, (out, lse), strict=True):
        torch.testing.assert_close(got.double().cpu(), right, atol=tolerance, rtol=tolerance)
    for got, right in zip(flash_gradients(dout.cuda(), *there, *on_gpu, **options), exact, strict=True):
        torch.testing.assert_close(got.double().cpu(), right, atol=5 * tolerance, rtol=5 * tolerance)
