"""Every backend against an fp64 reference: adapters, attention and rows by `cases`; products with packed weights, the
activation of an MLP.

Shapes: T tokens, I input width, O output width, M half of the input width of silu_mul.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loray_kernels import LinearWeights, Ops, RowTables, backend
from loray_kernels.cpu import structs
from loray_kernels.cuda import tables
from tests.kernels.backends import BACKENDS, NATIVE, make_ops
from tests.kernels.cases import *  # noqa: F403

DTYPES = [torch.float32, torch.bfloat16]
# (in, out): whole panels; parts of one; an odd input, whose last step is half a pair; a row of outputs less than one
SIZES = [(64, 96), (64, 100), (33, 50), (16, 1), (576, 960)]


@pytest.fixture(params=BACKENDS)
def ops(request: pytest.FixtureRequest) -> Ops:
    return make_ops(request.param)


@pytest.fixture(params=NATIVE)
def native(request: pytest.FixtureRequest) -> Ops:
    return make_ops(request.param)


def tensors(num_tokens: int, size: tuple[int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(num_tokens)
    in_features, out_features = size
    x_TI, weight_OI, bias_O = (
        torch.randn(*shape, generator=generator).to(dtype)
        for shape in ((num_tokens, in_features), (out_features, in_features), (out_features,))
    )
    return x_TI, weight_OI, bias_O


def packed(ops: Ops, weight_OI: Tensor, bias_O: Tensor | None = None) -> LinearWeights:
    weights = ops.pack_linear([weight_OI], bias_O)
    assert (weights.out_features, weights.in_features) == weight_OI.shape
    return weights


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_a_product_is_rounded_once(ops: Ops, dtype: torch.dtype, size: tuple[int, int]) -> None:
    x_TI, weight_OI, bias_O = tensors(13, size, dtype)
    expected_TO = x_TI.double() @ weight_OI.double().T
    tolerance = {torch.float32: 4e-6, torch.bfloat16: 4.1e-3}[dtype] * (1 + expected_TO.abs() + size[0] ** 0.5)
    plain, biased = packed(ops, weight_OI), packed(ops, weight_OI, bias_O)
    for got_TO, oracle_TO in (
        (ops.linear(x_TI, plain), expected_TO),
        (ops.linear(x_TI, biased), expected_TO + bias_O.double()),
        (ops.logits(x_TI, plain), expected_TO),
    ):
        assert got_TO.shape == oracle_TO.shape
        assert bool(((got_TO.double() - oracle_TO).abs() <= tolerance).all())
    assert ops.linear(x_TI, plain).dtype == dtype
    logits = ops.logits(x_TI, plain)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, ops.linear(x_TI, plain).float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_s_product_is_the_same_in_any_batch(native: Ops, dtype: torch.dtype) -> None:
    x_TI, weight_OI, bias_O = tensors(70, (64, 100), dtype)
    weights = packed(native, weight_OI, bias_O)
    whole_TO = native.linear(x_TI, weights)
    for num_tokens in (1, 2, 3, 5, 8, 9, 31, 33):
        assert torch.equal(native.linear(x_TI[:num_tokens], weights), whole_TO[:num_tokens])
    strided_TI = torch.cat([x_TI, x_TI], dim=1)[:, :64]  # rows apart from each other, as a part of a wider result
    assert torch.equal(native.linear(strided_TI, weights), whole_TO)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        assert torch.equal(native.linear(x_TI, weights), whole_TO)
    finally:
        torch.set_num_threads(before)


def test_no_tokens_give_no_rows(native: Ops) -> None:
    x_TI, weight_OI, _ = tensors(0, (64, 100), torch.bfloat16)
    assert native.linear(x_TI, packed(native, weight_OI)).shape == (0, 100)
    assert native.logits(x_TI, packed(native, weight_OI)).shape == (0, 100)
    assert native.silu_mul(torch.empty(0, 64, dtype=torch.bfloat16)).shape == (0, 32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 37])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_gated_activations_over_the_whole_range(ops: Ops, activation: str, dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    gate_up_TM = torch.randn(9, 2 * width, generator=generator) * 4
    gate_up_TM[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -0.0])  # e²⁰⁰ is beyond fp32
    gate_up_TM = gate_up_TM.to(dtype)
    gate, up = gate_up_TM.double().chunk(2, dim=1)
    if activation == "silu":
        expected, got = gate / (1 + (-gate).exp()) * up, ops.silu_mul(gate_up_TM)
        floor = torch.tensor(1e-3)
    else:
        argument = (2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)
        expected, got = 0.5 * gate * (1 + argument.tanh()) * up, ops.gelu_mul(gate_up_TM)
        floor = (gate * up).abs()  # torch's 1 + tanh is not exact near 0
    assert got.dtype == dtype
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 8e-3}[dtype]
    assert bool(((got.double() - expected).abs() <= tolerance * (expected.abs() + floor)).all())


def test_an_unknown_backend_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no kernel backend 'cubist'; there is: auto, cpu, cuda, reference"):
        backend("cubist")


def test_a_table_is_prepared_once_by_each_backend() -> None:
    rows = RowTables(((0, 4, torch.tensor([0, 8])),))
    assert structs.pack_rows(rows) is structs.pack_rows(rows)
    assert tables.pack_rows(rows) is tables.pack_rows(rows)
    assert structs.pack_rows(RowTables(rows.segments)) is not structs.pack_rows(rows)
    assert rows == RowTables(rows.segments)
