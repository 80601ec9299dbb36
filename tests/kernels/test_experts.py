"""Experts against fp64, and a token's bits in any batch and by any way.

Shapes: T tokens, E experts, K experts of a token, D hidden.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loray_kernels import ExpertWeights, Ops
from loray_kernels.reference import ReferenceOps
from tests.kernels.backends import BACKENDS, NATIVE, make_ops

DTYPES = [torch.float32, torch.bfloat16]
HIDDEN, WIDTH, NUM, PER_TOKEN = 48, 20, 7, 3


@pytest.fixture(params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return make_ops(request.param)


@pytest.fixture(params=NATIVE)
def native(request: pytest.FixtureRequest) -> Ops:
    return make_ops(request.param)


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def matrices(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Router (E, D), gate and up (E, 2 M, D), down (E, D, M)."""
    return (
        randn(1, NUM, HIDDEN, dtype=dtype),
        randn(2, NUM, 2 * WIDTH, HIDDEN, dtype=dtype) * 0.2,
        randn(3, NUM, HIDDEN, WIDTH, dtype=dtype) * 0.2,
    )


def packed(ops: Ops, dtype: torch.dtype, *, normalised: bool = True) -> ExpertWeights:
    router, gate_up, down = matrices(dtype)
    return ExpertWeights(
        router=ops.pack_linear([router]),
        gate_up=tuple(ops.pack_linear([g]) for g in gate_up),
        down=tuple(ops.pack_linear([d]) for d in down),
        per_token=PER_TOKEN,
        normalised=normalised,
    )


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_experts_are_those_of_fp64(ops: Ops, dtype: torch.dtype, normalised: bool) -> None:
    router, gate_up, down = (m.double() for m in matrices(dtype))
    x_TD = randn(4, 33, HIDDEN, dtype=dtype)
    logits_TE = (x_TD.double() @ router.T).to(dtype).double()  # which a router's are rounded to
    chosen_TK = logits_TE.argsort(dim=1, descending=True, stable=True)[:, :PER_TOKEN]
    expected_TD = torch.zeros(33, HIDDEN, dtype=torch.float64)
    for t, own in enumerate(chosen_TK.tolist()):
        shares = logits_TE[t, own].softmax(0) if normalised else logits_TE[t].softmax(0)[own]
        for expert, share in zip(own, shares, strict=True):
            gate, up = (gate_up[expert] @ x_TD[t].double()).chunk(2)
            expected_TD[t] += share * (down[expert] @ (torch.nn.functional.silu(gate) * up))
    got_TD = ops.experts(x_TD, packed(ops, dtype, normalised=normalised))
    assert got_TD.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got_TD.double(), expected_TD, atol=tolerance, rtol=tolerance)


def test_of_equal_logits_the_first_counts(ops: Ops) -> None:
    logits_TE = torch.tensor([[1.0, 3.0, 3.0, 1.0], [0.0, 0.0, 0.0, 0.0], [-3e38, 3e38, 0.0, 1.0]])
    experts_TK, shares_TK = ops.choose_experts(logits_TE, 2, normalised=True)
    assert experts_TK.tolist() == [[1, 2], [0, 1], [1, 3]]
    torch.testing.assert_close(shares_TK, torch.tensor([[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]]))
    _, shares_TK = ops.choose_experts(logits_TE, 2, normalised=False)
    torch.testing.assert_close(shares_TK[1], torch.tensor([0.25, 0.25]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_has_the_same_bits_in_any_batch_and_by_either_way(native: Ops, dtype: torch.dtype) -> None:
    """In one call, and op by op, as beside tokens with adapters on experts."""
    weights, x_TD = packed(native, dtype), randn(5, 70, HIDDEN, dtype=dtype)
    whole_TD = native.experts(x_TD, weights)
    assert torch.equal(ReferenceOps.experts(native, x_TD, weights), whole_TD)
    for tokens in (slice(0, 1), slice(7, 10), slice(30, 70)):
        assert torch.equal(native.experts(x_TD[tokens], weights), whole_TD[tokens])
    assert torch.equal(native.experts(x_TD.flip(0), weights).flip(0), whole_TD)
    assert native.experts(x_TD[:0], weights).shape == (0, HIDDEN)
