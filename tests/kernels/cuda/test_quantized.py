"""Products with quantised weights on a GPU: the kernels around torch's products, compiled for the CPU, on which torch
multiplies, too.

Shapes: T tokens, I input width, O output width.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loray_kernels.cuda.ops import CudaOps
from loray_kernels.reference import quantize_rows, quantized_linear
from tests.fixtures.quantized_weights import drawn, randn

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 40])
def test_int8_has_the_reference_s_bits(
    gathers: CudaOps, num_tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # On a CPU with AVX2 alone torch adds products of bytes in 16 bits, which saturates.
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: a.int() @ b.int())
    weight, x_TI, bias_O = drawn("int8", (48, 320))[0], randn(1, num_tokens, 330).to(dtype), randn(2, 48).to(dtype)
    x_TI = x_TI[:, :320]
    x_TI[0, 5] = torch.nan
    assert gathers.has_kernel(weight)
    for bias in (None, bias_O):
        got_TO = gathers.linear(x_TI, gathers.pack_linear([weight], bias))
        expected_TO = quantized_linear(x_TI, weight, bias, keeps_outliers=False)
        assert got_TO[0].isnan().all()
        assert torch.equal(got_TO[1:], expected_TO[1:])
    assert gathers.logits(x_TI, gathers.pack_linear([weight])).dtype is torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_float8_is_rounded_as_the_reference_does_and_multiplied_by_torch(
    gathers: CudaOps, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, x_TI, bias_O = drawn("fp8", (48, 320))[0], randn(1, 5, 320).to(dtype), randn(2, 48).to(dtype)
    x_TI[1] *= torch.logspace(-6, 1, 320)  # subnormal, too
    x_TI[2] = 0
    expected_TI, expected_T1 = quantize_rows(x_TI, torch.float8_e4m3fn)

    def scaled_mm(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        assert torch.equal(a.view(torch.uint8), expected_TI.view(torch.uint8))
        assert torch.equal(scale_a, expected_T1)
        assert b.dtype is torch.float8_e4m3fn
        assert b.stride(0) == 1  # column by column, as cuBLAS takes it
        assert scale_b.shape == (1, 48)
        return (a.float() @ b.float() * scale_a * scale_b).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", scaled_mm)
    monkeypatch.setattr(CudaOps, "has_kernel", lambda ops, weight: True)
    got_TO = gathers.linear(x_TI, gathers.pack_linear([weight], bias_O))
    assert got_TO.dtype is dtype
    torch.testing.assert_close(got_TO, quantized_linear(x_TI, weight, bias_O), rtol=1e-2, atol=2e-2)


def test_what_torch_does_not_multiply_has_no_kernel(gathers: CudaOps) -> None:
    assert not any(gathers.has_kernel(drawn(kind, (48, 64))[0]) for kind in ("int8 groups", "int4", "int4 zeros"))
    assert not gathers.has_kernel(drawn("int8", (50, 64))[0])
    fp8 = drawn("fp8", (48, 64))[0]
    assert not gathers.has_kernel(fp8)  # a CPU has no capability of a GPU
    x_TI = randn(1, 3, 64)
    assert torch.equal(gathers.linear(x_TI, gathers.pack_linear([fp8])), quantized_linear(x_TI, fp8))
