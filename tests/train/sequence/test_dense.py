"""Dense attention over real ranks against a boolean mask over whole rows, in fp64, and against one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loray.planning.sequence import DensePlan
from loray.train.sequence import SentBytes, SequenceGroup
from loray.train.sequence.dense import segment_gathered, ulysses_attention
from tests.fixtures.attention import oracle, oracle_mask
from tests.fixtures.ranks import Ranks
from tests.train.sequence.cases import HEADS, Case, Part, check, documents, qkv_of, weights_of

KINDS = ["full", "padded at the end", "packed and ragged"]
SCALE = 0.3
# Beside those of HEADS, of which ranks have unequal shares or none: one key-value head for several ranks; one that
# serves query heads of two ranks and others of one.
SHARED = [(4, 1), (12, 3)]


def attend(group: SequenceGroup, case: Case, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ulysses_attention(q, k, v, segment_gathered(torch.tensor(case.ids_BN), group), scale=SCALE)


def compute(group: SequenceGroup, cases: Sequence[Case]) -> list[Part]:
    """Forward and backward."""
    parts = []
    for case in cases:
        counted = replace(group, traffic=SentBytes())
        q, k, v = (x.requires_grad_() for x in qkv_of(case, group))
        out = attend(counted, case, q, k, v)
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


@pytest.mark.parametrize(("heads", "kv_heads"), [*HEADS, *SHARED])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_output_gradients_and_bytes(ranks: Ranks, size: int, heads: int, kv_heads: int) -> None:
    cases = [Case(10, heads, kv_heads, documents(kind, 10 * size)) for kind in KINDS]
    of_ranks: list[list[Part]] = ranks(size, compute, cases)
    alone = compute(SequenceGroup(), [Case(10 * size, heads, kv_heads, case.ids_BN) for case in cases])
    for case, parts, whole in zip(cases, zip(*of_ranks, strict=True), alone, strict=True):
        check(list(parts), *expected(case))
        assert torch.equal(torch.cat([p.out for p in parts], dim=1), whole.out)  # to the last bit
        plan, num_rows = DensePlan(10 * size, size, heads, kv_heads), len(case.ids_BN)
        assert [p.forward_bytes for p in parts] == [8 * plan.forward_elements(r, 8, num_rows) for r in range(size)]
        assert [p.backward_bytes for p in parts] == [8 * plan.backward_elements(r, 8, num_rows) for r in range(size)]


@pytest.mark.parametrize("heads", [8, 6])
def test_bf16_is_near_fp64(ranks: Ranks, heads: int) -> None:
    case = Case(64, heads, 2, documents("full", 256), torch.bfloat16)
    parts = [part for (part,) in ranks(4, compute, [case])]
    out, gradients = expected(case)
    assert {p.out.dtype for p in parts} == {torch.bfloat16}
    torch.testing.assert_close(torch.cat([p.out for p in parts], dim=1).double(), out, atol=2e-2, rtol=2e-2)
    for i, gradient in enumerate(gradients):
        got = torch.cat([p.gradients[i] for p in parts], dim=2).double()
        assert torch.linalg.vector_norm(got - gradient) <= 1e-2 * torch.linalg.vector_norm(gradient)


def only_values(group: SequenceGroup, case: Case) -> Tensor | None:
    q, k, v = qkv_of(case, group)
    v.requires_grad_()
    attend(group, case, q, k, v).square().sum().backward()
    return v.grad


@pytest.mark.parametrize(("size", "heads", "kv_heads"), [(2, 4, 2), (4, 3, 1)])
def test_values_alone_may_be_trained(ranks: Ranks, size: int, heads: int, kv_heads: int) -> None:
    """As in the first layer of a model with adapters on v_proj."""
    case = Case(32 // size, heads, kv_heads, documents("full", 32))
    q, k, v = qkv_of(case)
    mask = oracle_mask(1, 1, 32, 64, None).expand(-1, heads, -1, -1)
    oracle(q, k, v.requires_grad_(), mask, SCALE).square().sum().backward()
    got = torch.cat(ranks(size, only_values, case), dim=2)
    torch.testing.assert_close(got, v.grad, atol=1e-12, rtol=1e-12)
