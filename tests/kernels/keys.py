"""Keys and values in a pool, and rotation, by the op that does both."""

from __future__ import annotations

import torch
from torch import Tensor

from loray_kernels import AdapterSegments, AttentionMeta, KvLayout, Ops, StepInputs


def store(
    ops: Ops, pool: Tensor, layout: KvLayout, layer: int, k_TKd: Tensor, v_TKd: Tensor, meta: AttentionMeta
) -> None:
    """Keys without a rotation."""
    cos_Td = k_TKd.new_ones(k_TKd.shape[0], k_TKd.shape[2])
    step = StepInputs(pool, layout, meta, AdapterSegments((), ()), cos_Td, torch.zeros_like(cos_Td))
    ops.rope_kv(k_TKd, k_TKd, v_TKd, step, layer)


def turned(ops: Ops, x_THd: Tensor, cos_Td: Tensor, sin_Td: Tensor) -> Tensor:
    """Queries; all heads are stored as keys too, and must stand there as they come back."""
    num_tokens, num_heads, d = x_THd.shape
    layout = KvLayout(num_layers=1, block_tokens=16, num_kv_heads=num_heads, head_dim=d)
    pool = x_THd.new_zeros(-(-num_tokens // 16) * layout.layer_share)
    meta = AttentionMeta((0, num_tokens), (num_tokens,), (), torch.arange(num_tokens, device=x_THd.device))
    y_THd = ops.rope_kv(x_THd, x_THd, x_THd, StepInputs(pool, layout, meta, AdapterSegments((), ()), cos_Td, sin_Td), 0)
    k_THd, v_THd = pool.view(-1, 2, 16, num_heads, d).transpose(0, 1).reshape(2, -1, num_heads, d)[:, :num_tokens]
    assert torch.equal(k_THd, y_THd)
    assert torch.equal(v_THd, x_THd)
    return y_THd
