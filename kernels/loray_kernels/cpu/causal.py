"""Causal attention of whole segments on a CPU, forward and backward: what training and dense evaluation need.

bf16 on CPUs with AVX512-BF16, of a width that 16 divides, goes to csrc/causal.cpp, everything else to torch's flash
kernel for CPUs.

Shapes: F segments with their key-value heads, R query heads of each, L positions, D head width.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch
from torch import Tensor

from loray_kernels.compiled import BackendUnavailable
from loray_kernels.cpu.build import causal_functions, supported

_torch_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_torch_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def causal_forward(q_FRLD: Tensor, k_FLD: Tensor, v_FLD: Tensor, scale: float | None) -> tuple[Tensor, Tensor]:
    """Attention of each query to its own and earlier positions → (F, R, L, D), and log Σ exp(score) (F, R, L).

    The logarithm is fp64 for fp64, else fp32. `scale` defaults to 1/√D. Raises ValueError where shapes or dtypes do not
    fit together.
    """
    _check(q_FRLD, k_FLD, v_FLD)
    if (isa := _isa_for(q_FRLD)) is None:
        shared_k, shared_v = _repeated(q_FRLD, k_FLD, v_FLD)
        out, lse = _torch_forward(q_FRLD, shared_k, shared_v, 0.0, True, scale=scale)
        return out, lse
    q, k, v = (x.contiguous() for x in (q_FRLD, k_FLD, v_FLD))
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=torch.float32)
    forward, _ = causal_functions(isa, q.dtype)
    forward(*(x.data_ptr() for x in (q, k, v, out, lse)), *q.shape, _scale(q, scale), torch.get_num_threads())
    return out, lse


def causal_backward(
    dout_FRLD: Tensor,
    q_FRLD: Tensor,
    k_FLD: Tensor,
    v_FLD: Tensor,
    out_FRLD: Tensor,
    lse_FRL: Tensor,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `causal_forward`'s inputs, from its results: (F, R, L, D), (F, L, D), (F, L, D).

    Raises ValueError where shapes or dtypes do not fit together.
    """
    _check(q_FRLD, k_FLD, v_FLD, dout_FRLD, out_FRLD)
    if (isa := _isa_for(q_FRLD)) is None:
        shared_k, shared_v = _repeated(q_FRLD, k_FLD, v_FLD)
        dq, dk, dv = _torch_backward(dout_FRLD, q_FRLD, shared_k, shared_v, out_FRLD, lse_FRL, 0.0, True, scale=scale)
        return dq, dk.sum(1), dv.sum(1)
    inputs = [x.contiguous() for x in (dout_FRLD, q_FRLD, k_FLD, v_FLD, out_FRLD, lse_FRL)]
    _, q, k, v, *_ = inputs
    grads = dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    sums = q.new_empty(2, *q.shape, dtype=torch.float32)
    _, backward = causal_functions(isa, q.dtype)
    pointers = (x.data_ptr() for x in (*inputs, *grads, sums))
    backward(*pointers, *q.shape, _scale(q, scale), torch.get_num_threads())
    return dq, dk, dv


def _repeated(q_FRLD: Tensor, *shared_FLD: Tensor) -> list[Tensor]:
    """Keys or values for each of the R query heads, (F, R, L, D), with a stride of 0."""
    return [x[:, None].expand(-1, q_FRLD.shape[1], -1, -1) for x in shared_FLD]


def _check(q_FRLD: Tensor, k_FLD: Tensor, v_FLD: Tensor, *like_q: Tensor) -> None:
    num, _, length, width = q_FRLD.shape
    shapes = [(k_FLD, (num, length, width)), (v_FLD, (num, length, width)), *((x, q_FRLD.shape) for x in like_q)]
    for tensor, shape in shapes:
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != q_FRLD.dtype:
            found = f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise ValueError(f"{found} does not fit queries {tuple(q_FRLD.shape)} of {q_FRLD.dtype}")


def _scale(q_FRLD: Tensor, scale: float | None) -> float:
    return float(q_FRLD.shape[-1] ** -0.5 if scale is None else scale)


def _isa_for(q_FRLD: Tensor) -> str | None:
    """The instruction set of our kernel for these tensors; None for torch's."""
    return _fast_isa() if q_FRLD.dtype == torch.bfloat16 and q_FRLD.shape[-1] % 16 == 0 else None


@cache
def _fast_isa() -> str | None:
    try:
        isa = supported()[-1]
        if isa not in ("avx512", "amx"):
            return None
        causal_functions(isa, torch.bfloat16)
    except BackendUnavailable as e:
        warnings.warn(f"attention by torch's slower kernel: {e}", RuntimeWarning, stacklevel=2)
        return None
    return isa
