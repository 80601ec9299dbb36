"""The backends under test: the reference, the C++ kernels as this CPU runs them (`make test-portable`: as slower ones
do), and those for ARM where it can be emulated. Keys and values in a pool, and rotation, by the op that does both.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loray_kernels import AdapterSegments, AttentionMeta, BackendUnavailable, KvLayout, Ops, StepInputs, backend
from loray_kernels.cpu.build import supported
from loray_kernels.cpu.ops import CpuOps
from loray_kernels.reference import quantize_rows
from tests.kernels import emulated

EMULATED = pytest.param(f"cpu {emulated.ISA}", marks=pytest.mark.slow)
NATIVE = ["cpu", EMULATED]
# What AVX2 with VNNI has of its own are products of integers.
INTEGER = [*NATIVE, pytest.param("cpu avxvnni", marks=pytest.mark.slow)]
BACKENDS = ["reference", *NATIVE]


def make_ops(name: str) -> Ops:
    kind, _, isa = name.partition(" ")
    try:
        if not isa:
            return backend(kind)
        if isa == emulated.ISA:
            emulated.provide()
        elif isa not in supported():
            pytest.skip(f"this CPU has no {isa}")
        return CpuOps(isa)
    except BackendUnavailable as e:
        pytest.skip(str(e))


def store(
    ops: Ops, pool: Tensor, layout: KvLayout, layer: int, k_TKd: Tensor, v_TKd: Tensor, meta: AttentionMeta
) -> None:
    """Keys without a rotation."""
    cos_Td = k_TKd.new_ones(k_TKd.shape[0], k_TKd.shape[2])
    step = StepInputs(pool, layout, meta, AdapterSegments((), ()), cos_Td, torch.zeros_like(cos_Td))
    ops.rope_kv(k_TKd, k_TKd, v_TKd, step, layer)


def as_stored(x_TKd: Tensor, layout: KvLayout) -> Tensor:
    """What a pool gives back of keys or values, in fp64."""
    if not layout.int8_per_element:
        return x_TKd.double()
    q, scale = quantize_rows(x_TKd.flatten(0, 1))
    return (q.double() * scale.double()).view(x_TKd.shape)


def turned(ops: Ops, x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    """Queries; all heads are stored as keys too, and must stand there as they come back."""
    num_tokens, num_heads, d = x_THd.shape
    layout = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=num_heads, head_dim=d)
    pool = x_THd.new_zeros(-(-num_tokens // 16) * layout.layer_share)
    meta = AttentionMeta((0, num_tokens), (num_tokens,), (), torch.arange(num_tokens, device=x_THd.device))
    y_THd = ops.rope_kv(x_THd, x_THd, x_THd, StepInputs(pool, layout, meta, AdapterSegments((), ()), cos_Td, sin_Td), 0)
    k_NE, v_NE = pool.view(-1, 2, 16 * num_heads * d).unbind(dim=1)
    if isinstance(ops, CpuOps) and d % 16 == 0 and x_THd.dtype is not torch.float16:
        # units of four bytes, each of all tokens of a block
        k_NE = k_NE.reshape(k_NE.shape[0], -1, 16, 4 // x_THd.itemsize).transpose(1, 2)
    k_THd, v_THd = (x_NE.reshape(-1, num_heads, d)[:num_tokens] for x_NE in (k_NE, v_NE))
    assert torch.equal(k_THd, y_THd)
    assert torch.equal(v_THd, x_THd)
    return y_THd
