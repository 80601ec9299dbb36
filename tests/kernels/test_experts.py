"""Experts against fp64, and a token's bits in any batch and by any way.

Shapes: T tokens, E experts, K experts of a token, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from loray_kernels import AdapterSegments, ExpertWeights, LoraTable, Ops, RowTables
from tests.kernels.backends import BACKENDS, NATIVE, make_ops

DTYPES = [torch.float32, torch.bfloat16]
HIDDEN, WIDTH, NUM, PER_TOKEN, OFFSET = 48, 20, 7, 3, 11


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


def computed(ops: Ops, x_TD: Tensor, weights: ExpertWeights, lora: Mapping[str, LoraTable] = {}) -> Tensor:
    """Of adapters the first has tokens from 3 to 9, the second from 9 on."""
    segments = AdapterSegments((3, 9), (9, len(x_TD)))
    return ops.experts(x_TD, weights, store(x_TD.dtype), lora if len(x_TD) > 9 else {}, segments, OFFSET)


def store(dtype: torch.dtype) -> Tensor:
    return randn(6, 40_000, dtype=dtype) * 0.2


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
    got_TD = computed(ops, x_TD, packed(ops, dtype, normalised=normalised))
    assert got_TD.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(got_TD.double(), expected_TD, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_clamped_gate_is_that_of_fp64(ops: Ops, dtype: torch.dtype) -> None:
    gate_up_TM = (randn(8, 9, 2 * 37) * 4).to(dtype)
    gate_up_TM[0, :3] = torch.tensor([-200.0, 200.0, 0.0])
    gate, up = gate_up_TM.double().chunk(2, dim=1)
    gate, up = gate.clamp(max=3.0), up.clamp(-3.0, 3.0)
    expected = gate * torch.sigmoid(1.702 * gate) * (up + 1)
    got = ops.clamped_mul(gate_up_TM, 3.0)
    assert got.dtype == dtype
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 8e-3}[dtype]
    assert bool(((got.double() - expected).abs() <= tolerance * (expected.abs() + 1e-3)).all())


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
    whole_TD = computed(native, x_TD, weights)
    for tokens in (slice(0, 1), slice(7, 10), slice(30, 70)):
        assert torch.equal(computed(native, x_TD[tokens], weights), whole_TD[tokens])
    assert torch.equal(computed(native, x_TD.flip(0), weights).flip(0), whole_TD)
    assert computed(native, x_TD[:0], weights).shape == (0, HIDDEN)
    with_lora_TD = computed(native, x_TD, weights, tables()[0])
    assert torch.equal(with_lora_TD[:3], whole_TD[:3])
    assert not torch.equal(with_lora_TD[3:9], whole_TD[3:9])
    again_TD = computed(native, torch.cat([x_TD[:30], x_TD[60:]]), weights, tables()[0])
    assert torch.equal(again_TD[:30], with_lora_TD[:30])


def tables() -> tuple[dict[str, LoraTable], dict[str, list[list[tuple[Tensor, Tensor]]]]]:
    """Two adapters, of ranks 2 and 3, the second without up_proj; and by module A (R, I) and B (R, O) of each adapter's
    experts, in fp32.
    """
    found, dense, at = {}, {}, 0
    for module, out, width in (("gate_proj", WIDTH, HIDDEN), ("up_proj", WIDTH, HIDDEN), ("down_proj", HIDDEN, WIDTH)):
        ranks = (2, 0 if module == "up_proj" else 3)
        starts = (0, 2 * NUM, sum(ranks) * NUM)
        firsts = []
        for size in (width, out):
            firsts.append(torch.arange(starts[-1]) * size + at)
            at += starts[-1] * size
        a, b = (RowTables(((0, size, rows),)) for size, rows in zip((width, out), firsts, strict=True))
        found[module] = LoraTable(a, b, starts, (0.5, 2.0))
        dense[module] = []
        for n, rank in enumerate(ranks):
            own = slice(starts[n], starts[n + 1])
            rows = [
                store(torch.float32)[(first[own] + OFFSET).unsqueeze(1) + torch.arange(size)].view(NUM, rank, size)
                for first, size in zip(firsts, (width, out), strict=True)
            ]
            dense[module].append(list(zip(*rows, strict=True)))
    return found, dense


def test_lora_of_experts_is_that_of_fp64(ops: Ops) -> None:
    (router, gate_up, down), (lora, dense) = (m.double() for m in matrices(torch.float32)), tables()
    x_TD, scales = randn(7, 31, HIDDEN), (0.5, 2.0)

    def added(module: str, t: int, expert: int, x: Tensor) -> Tensor:
        n = 0 if t < 9 else 1
        a_RI, b_RO = (m.double() for m in dense[module][n][expert])
        return scales[n] * (b_RO.T @ (a_RI @ x)) if t >= 3 else torch.zeros(b_RO.shape[1], dtype=torch.float64)

    expected_TD = torch.zeros(31, HIDDEN, dtype=torch.float64)
    for t, x in enumerate(x_TD.double()):
        values, own = (router @ x).topk(PER_TOKEN)
        for expert, share in zip(own.tolist(), values.softmax(0), strict=True):
            gate, up = (gate_up[expert] @ x).chunk(2)
            gate, up = gate + added("gate_proj", t, expert, x), up + added("up_proj", t, expert, x)
            middle = torch.nn.functional.silu(gate) * up
            expected_TD[t] += share * (down[expert] @ middle + added("down_proj", t, expert, middle))
    got_TD = computed(ops, x_TD, packed(ops, torch.float32), lora)
    torch.testing.assert_close(got_TD.double(), expected_TD, atol=1e-5, rtol=1e-5)
