"""Products with quantised weights on a GPU: the kernels around torch's products, compiled for the CPU, on which torch
multiplies, too.

Shapes: T tokens, I input width, O output width.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pytest
import torch
from torch import Tensor

from loray.bases.quantization import Quantization
from loray.bases.registry import BaseModel
from loray.engine import build
from loray.spec import ServeSpec
from loray_kernels import QuantizedWeight, Weight
from loray_kernels.cuda.ops import INT4_GROUPS, CudaOps
from loray_kernels.reference import quantize_rows, quantized_linear
from tests.fixtures.engines import Spy, for_each, run
from tests.fixtures.peft_adapters import TestAdapter
from tests.fixtures.quantized_weights import drawn, quantized_tensors, randn
from tests.fixtures.shim import NotingLauncher
from tests.fixtures.shim_ops import ShimOps

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


class Int4:
    """Torch's product of int4 on a GPU, by the one that it has for CPUs: the same numbers in another order of bytes.
    `num`: products.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.num = 0
        monkeypatch.setattr(torch, "_convert_weight_to_int4pack", self._pack)
        monkeypatch.setattr(torch, "_weight_int4pack_mm", self._multiply)

    def _pack(self, pairs_OJ: Tensor, inner_k_tiles: int) -> Tensor:
        assert pairs_OJ.dtype is torch.uint8
        assert pairs_OJ.is_contiguous()
        assert inner_k_tiles in (2, 4, 8)
        assert 2 * pairs_OJ.shape[1] % (16 * inner_k_tiles) == 0
        q_OI = torch.stack((pairs_OJ >> 4, pairs_OJ & 15), dim=2).flatten(1).int()
        return torch._convert_weight_to_int4pack_for_cpu(q_OI, inner_k_tiles)

    def _multiply(self, x_TI: Tensor, packed: Tensor, group: int, scales_GO2: Tensor) -> Tensor:
        assert x_TI.dtype is scales_GO2.dtype is torch.bfloat16
        assert x_TI.is_contiguous()
        assert scales_GO2.is_contiguous()
        assert scales_GO2.shape == (x_TI.shape[1] // group, packed.shape[0], 2)
        self.num += 1
        return torch._weight_int4pack_mm_for_cpu(x_TI, packed, group, scales_GO2)


def drawn_int4(out: int, width: int, group: int, *, zeros: bool) -> QuantizedWeight:
    scale_OG = randn(5, out, width // group).abs() * 0.02 + 0.01
    q_OJ = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (out, width // 2), dtype=np.uint8))
    zero_OG = torch.from_numpy(np.random.default_rng(1).integers(0, 16, scale_OG.shape)).float()
    return QuantizedWeight(q_OJ, scale_OG, zero_OG if zeros else None)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("width", "group"), [(320, 32), (320, 64), (384, 128), (512, 256)])
def test_int4_is_multiplied_in_bf16(
    gathers: CudaOps, launcher: NotingLauncher, width: int, group: int, zeros: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scales, shifts and weights are rounded to bf16: each loses no more than 2^-9 of the largest weight of its group,
    which is 15 or 8 scales.
    """
    int4, weight = Int4(monkeypatch), drawn_int4(48, width, group, zeros=zeros)
    x_TI, bias_O = randn(1, 5, width + 8)[:, 4:-4].bfloat16(), randn(2, 48).bfloat16()
    assert gathers.has_kernel(weight)
    packed = gathers.pack_linear([weight.rows(slice(0, 16)), weight.rows(slice(16, 48))], bias_O)
    assert packed.are_integers
    got_TO = gathers.linear(x_TI, packed)
    assert got_TO.dtype is torch.bfloat16
    whole_OI = weight.dequantized(slice(None), torch.float32).double()
    step_OI = weight.scale_OG.double().repeat_interleave(group, dim=1) * (15 if zeros else 8)
    expected_TO = x_TI.double() @ whole_OI.T + bias_O.double()
    bound_TO = 3 * 2**-9 * (x_TI.double().abs() @ step_OI.T) + 2**-7 * (expected_TO.abs() + bias_O.abs() + 0.1)
    assert bool(((got_TO.double() - expected_TO).abs() <= bound_TO).all())
    # The same with the weights as torch has them, which only GPUs round to bf16.
    assert packed.scales_GO2 is not None
    scale_OI, zero_OI = (part_GO.T.double().repeat_interleave(group, dim=1) for part_GO in packed.scales_GO2.unbind(2))
    torchs_OI = (weight.values().double() - 8) * scale_OI + zero_OI
    nearer_TO = x_TI.double() @ torchs_OI.T + bias_O.double()
    bound_TO = 2**-9 * (x_TI.double().abs() @ torchs_OI.T.abs()) + 2**-7 * (nearer_TO.abs() + bias_O.abs())
    assert bool(((got_TO.double() - nearer_TO).abs() <= bound_TO).all())
    assert (int4.num, launcher.kernels) == (1, [])  # nothing is launched beside torch's
    half_TO = gathers.linear(x_TI.half(), packed)
    assert half_TO.dtype is torch.float16
    assert torch.equal(half_TO, gathers.linear(x_TI.half().bfloat16(), packed).half())


def test_int4_without_zeros_has_scales_that_bf16_holds_exactly(
    gathers: CudaOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    Int4(monkeypatch)
    plain = drawn_int4(32, 64, 32, zeros=False)
    weight = QuantizedWeight(plain.q_OI, plain.scale_OG.bfloat16().float())
    scales_GO2 = gathers.pack_linear([weight]).scales_GO2
    assert scales_GO2 is not None
    assert torch.equal(scales_GO2[..., 0].float(), weight.scale_OG.T)
    assert not scales_GO2[..., 1].any()


def test_a_base_in_int4_decodes_by_recorded_steps(
    base: BaseModel, adapters: list[TestAdapter], ops: ShimOps, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an adapter and without: as launch by launch, and as with weights that are dequantised but for roundings."""
    int4 = Int4(monkeypatch)

    def run_on(tensors: Iterable[tuple[str, Weight]], record_s: float) -> dict[str, Tensor]:
        spec = ServeSpec(base=base.name, dtype="bfloat16", pool_bytes=8 << 20, itl_slo_ms=1e9, graph_record_s=record_s)
        by_digest = {a.ref.digest: a for a in adapters}
        load = lambda ref, packer: packer.pack(by_digest[ref.digest].load(base))  # noqa: E731
        engine = build.build_engine(spec, base, load, tensors)
        engine.warm_up()
        spy, ops.replayed, int4.num = Spy(engine), [], 0
        run(engine, for_each([None, adapters[0]], max_tokens=4), together=True)
        return {name: torch.stack(rows) for name, rows in spy.logits.items()}

    recorded = run_on(quantized_tensors(base, "int4"), 1e9)
    assert ops.replayed == [8] * 3
    of_prompts = int4.num  # a replay does not come here
    scattered = run_on(quantized_tensors(base, "int4"), 0)
    assert int4.num == of_prompts + 3 * 4 * base.config.num_layers
    dense = (
        (name, w.dequantized(slice(None), torch.float32) if isinstance(w, QuantizedWeight) else w)
        for name, w in quantized_tensors(base, "int4")
    )
    plain = run_on(dense, 0)
    for name, rows_SV in recorded.items():
        torch.testing.assert_close(rows_SV, scattered[name], rtol=0.02, atol=0.02)
        first_V, expected_V = rows_SV[0], plain[name][0]
        assert not torch.equal(first_V, expected_V)
        assert float((first_V - expected_V).square().mean().sqrt() / expected_V.std()) < 0.03


def test_what_torch_does_not_multiply_has_no_kernel(gathers: CudaOps) -> None:
    assert not any(gathers.has_kernel(drawn(kind, (48, 64))[0]) for kind in ("int8 groups", "int4", "int4 zeros"))
    assert not gathers.has_kernel(drawn_int4(44, 64, 32, zeros=False))
    for size in (16, 32, 64, 128, 256, 512, None):  # what plans say, too
        weight, quantization = drawn_int4(48, 512, size or 512, zeros=False), Quantization("awq", "int4", size)
        assert gathers.has_kernel(weight) == (size in INT4_GROUPS)
        assert quantization.is_kept(on_gpu=True) == (size in INT4_GROUPS)
        assert quantization.activations(on_gpu=True) is None
    assert not gathers.has_kernel(drawn("int8", (50, 64))[0])
    fp8 = drawn("fp8", (48, 64))[0]
    assert not gathers.has_kernel(fp8)  # a CPU has no capability of a GPU
    x_TI = randn(1, 3, 64)
    assert torch.equal(gathers.linear(x_TI, gathers.pack_linear([fp8])), quantized_linear(x_TI, fp8))
