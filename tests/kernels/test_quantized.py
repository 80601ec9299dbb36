"""Quantised weights: what they stand for, and products with them, against fp64.

Shapes: T tokens, I input width, O output width, G groups of columns.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loray_kernels import Ops, QuantizedWeight
from loray_kernels.ops import join_weights
from loray_kernels.reference import quantize_activations, quantize_rows, quantized_linear
from tests.fixtures.quantized_weights import KINDS, drawn, randn
from tests.kernels.backends import INTEGER, make_ops


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_stands_for_scale_times_q_less_zero(kind: str) -> None:
    weight, whole_OI = drawn(kind, (6, 64))
    assert weight.shape == whole_OI.shape
    torch.testing.assert_close(weight.dequantized(slice(None), torch.float32).double(), whole_OI, rtol=2e-7, atol=0)
    rows = weight.dequantized(slice(2, 5), torch.bfloat16)
    assert torch.equal(rows, weight.dequantized(slice(None), torch.float32)[2:5].bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_a_weight_stand_for_parts_of_the_matrix(kind: str) -> None:
    weight, _ = drawn(kind, (6, 64))
    other, _ = drawn("int4" if kind == "int4 zeros" else kind, (3, 64), seed=1)
    whole_OI, other_OI = (w.dequantized(slice(None), torch.float32) for w in (weight, other))

    def equal(part: QuantizedWeight, expected: Tensor) -> None:
        assert part.shape == expected.shape
        assert torch.equal(part.dequantized(slice(None), torch.float32), expected)

    equal(weight.rows(slice(1, 4)), whole_OI[1:4])
    equal(weight.columns(slice(32, 64)).clone(), whole_OI[:, 32:])
    equal(weight.padded(2), torch.cat((whole_OI, torch.zeros(2, 64))))
    equal(QuantizedWeight.join([weight, other]), torch.cat((whole_OI, other_OI)))
    joined = join_weights([weight, other_OI.bfloat16()])  # only one is quantised
    assert isinstance(joined, Tensor)
    assert torch.equal(joined, torch.cat((whole_OI.bfloat16(), other_OI.bfloat16())))


def test_what_cannot_be_joined_or_cut_is_refused() -> None:
    int8, int4 = (drawn(kind, (4, 64))[0] for kind in ("int8", "int4"))
    with pytest.raises(ValueError, match=r"in one way, not as int4 in groups of 16 and int8 by rows"):
        join_weights([int8, int4])
    with pytest.raises(ValueError, match="columns 0 to 24 of a weight quantised in groups of 16 cut a group"):
        int4.columns(slice(0, 24))


def test_activations_are_quantised_row_by_row() -> None:
    x_TI = torch.tensor(
        [[1.0, -2.0, 0.5, 127 / 128], [0.0, 0.0, 0.0, 0.0], [1.0, torch.inf, 0.0, 1.0], [1e-38, 0, 0, 0]]
    )
    q_TI, scale_T1 = quantize_rows(x_TI)
    assert q_TI[:2].tolist() == [[64, -127, 32, 63], [0, 0, 0, 0]]
    assert scale_T1[:2, 0].tolist() == [pytest.approx(2 / 127), 0.0]
    assert scale_T1[2].isnan().all()
    assert q_TI[2:].eq(0).all()
    assert quantized_linear(x_TI, drawn("int8", (3, 4))[0])[2].isnan().all()


def test_an_outlier_takes_no_digits_from_its_row() -> None:
    x_TI = randn(3, 6, 512)
    x_TI[1, 7], x_TI[2, :3], x_TI[3] = 1000, 50, 0
    x_TI[3, 9], x_TI[4, 5] = -1e30, torch.nan
    q_TI, scale_T1 = quantize_activations(x_TI)
    mean_T1 = x_TI.abs().double().mean(dim=1, keepdim=True)
    assert q_TI[0].abs().max() == 127
    assert [int((row.abs() > 127).sum()) for row in q_TI] == [0, 1, 3, 1, 0, 0]
    for row in (0, 1, 2, 3, 5):
        assert float(scale_T1[row]) <= 8.02 * float(mean_T1[row]) / 127
        error_I = (q_TI[row].double() * scale_T1[row].double() - x_TI[row].double()).abs()
        assert bool((error_I <= scale_T1[row] * 0.501 + 1e-6 * x_TI[row].abs()).all())
        assert q_TI[row].abs().sum() <= 127 * 512
    assert scale_T1[4].isnan()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_differs_from_fp64_by_the_rounding_of_activations(kind: str, dtype: torch.dtype) -> None:
    """The product of quantised activations is exact up to fp32's rounding; that with the activations themselves
    differs by no more than half a step of each, as far as it meets a weight.
    """
    weight, whole_OI = drawn(kind, (48, 96))
    x_TI, bias_O = randn(1, 9, 96).to(dtype), randn(2, 48).to(dtype)
    got_TO = quantized_linear(x_TI, weight, bias_O)
    assert got_TO.dtype == dtype
    q_TI, scale_T1 = quantize_rows(x_TI, torch.float8_e4m3fn) if kind == "fp8" else quantize_activations(x_TI)
    near_TI = q_TI.double() * scale_T1.double()
    expected_TO = near_TI @ whole_OI.T + bias_O.double()
    rounding = 2e-6 * (near_TI.abs() @ whole_OI.T.abs() + 1) + (
        4e-3 * expected_TO.abs() if dtype is torch.bfloat16 else 0
    )
    assert bool(((got_TO.double() - expected_TO).abs() <= rounding).all())
    step_T1 = scale_T1.double() / 2 * 1.0001
    if kind == "fp8":  # three bits behind the point, and a smallest step
        step_T1 = x_TI.double().abs().amax(dim=1, keepdim=True) * 2**-4
    bound = step_T1 * whole_OI.abs().sum(dim=1)
    assert bool(((near_TI - x_TI.double()) @ whole_OI.T).abs().le(bound).all())


# -- the C++ kernels ---------------------------------------------------------------------------------------------------

# (in, out): whole panels and steps; parts of both; a row of outputs less than one
SIZES = {"int8": [(64, 96), (33, 50), (16, 1), (577, 130)], "other": [(64, 96), (96, 50), (592, 130)]}
CASES = [(kind, size) for kind in KINDS[:4] for size in SIZES.get(kind, SIZES["other"])]


@pytest.fixture(params=INTEGER)
def native(request: pytest.FixtureRequest) -> Ops:
    return make_ops(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("kind", "size"), CASES)
def test_the_kernels_give_the_reference_s_bits(
    native: Ops, kind: str, size: tuple[int, int], dtype: torch.dtype
) -> None:
    """Of one token, some, and enough for tiles and blocks; of strided rows, and of rows of zeros or not finite."""
    in_features, out_features = size
    weight, _ = drawn(kind, (out_features, in_features))
    assert native.has_kernel(weight)
    bias_O, wide_TI = randn(2, out_features).to(dtype), (randn(1, 150, in_features + 8) * 3).to(dtype)
    x_TI = wide_TI[:, :in_features]
    x_TI[3], x_TI[5, 0] = 0, torch.inf
    x_TI[7, in_features // 2] *= 1000  # outliers: one, all there is of a row, as many as there may be
    x_TI[8], x_TI[8, -1] = 0, -5
    x_TI[9], x_TI[9, :: min(10, in_features)] = 0.01, 3
    plain, biased = native.pack_linear([weight]), native.pack_linear([weight], bias_O)
    expected_TO, biased_TO = quantized_linear(x_TI, weight), quantized_linear(x_TI, weight, bias_O)
    assert expected_TO[5].isnan().all()
    for num_tokens in (0, 1, 2, 3, 5, 8, 13, 150):
        got_TO = native.linear(x_TI[:num_tokens], plain)
        assert torch.equal(got_TO.nan_to_num(), expected_TO[:num_tokens].nan_to_num())
    assert torch.equal(native.linear(x_TI[:5], biased), biased_TO[:5])
    logits_TO = native.logits(x_TI[:5], biased)
    assert logits_TO.dtype is torch.float32
    assert torch.equal(logits_TO, biased_TO[:5].float())


def test_the_largest_sums_are_exact(native: Ops) -> None:
    """All weights and activations at their ends, for as many inputs as a base of 400 billion parameters has."""
    in_features = 53248
    weight = QuantizedWeight(torch.full((2, in_features), -128, dtype=torch.int8), torch.ones(2, 1))
    x_TI = torch.tensor([[3.0], [-3.0]]).expand(2, in_features)
    expected = 128.0 * in_features * 3
    got_TO = native.linear(x_TI, native.pack_linear([weight]))
    torch.testing.assert_close(got_TO, torch.tensor([[-expected] * 2, [expected] * 2]), rtol=1e-6, atol=0)


def test_matrices_of_one_input_are_packed_side_by_side(native: Ops) -> None:
    parts = [drawn("int8", (rows, 64), seed=rows)[0] for rows in (32, 16, 7)]
    x_TI = randn(1, 3, 64).bfloat16()
    apart = [native.linear(x_TI, native.pack_linear([part])) for part in parts]
    assert torch.equal(native.linear(x_TI, native.pack_linear(parts)), torch.cat(apart, dim=1))
    plain_OI = randn(9, 8, 64).bfloat16()
    mixed = native.linear(x_TI, native.pack_linear([parts[0], plain_OI]))
    dequantized = torch.cat((parts[0].dequantized(slice(None), torch.bfloat16), plain_OI))
    assert torch.equal(mixed, native.linear(x_TI, native.pack_linear([dequantized])))


def test_other_dtypes_are_multiplied_in_fp32(native: Ops) -> None:
    weight, bias_O, x_TI = drawn("int8", (20, 64))[0], randn(2, 20).half(), randn(1, 3, 64).half()
    got_TO = native.linear(x_TI, native.pack_linear([weight], bias_O))
    assert torch.equal(got_TO, quantized_linear(x_TI, weight, bias_O))


def test_what_has_no_kernel_is_the_reference_s(native: Ops) -> None:
    x_TI = randn(1, 3, 64).bfloat16()
    whole, scale_OG = drawn("int4", (4, 64))[0], torch.ones(4, 8)
    for weight in (
        drawn("fp8", (4, 64))[0],
        QuantizedWeight(whole.q_OI, whole.scale_OG, whole.zeros() + 0.5),
        QuantizedWeight(whole.values().view(torch.int8), scale_OG),  # groups of 8
    ):
        assert not native.has_kernel(weight)
        assert torch.equal(native.linear(x_TI, native.pack_linear([weight])), quantized_linear(x_TI, weight))
