"""Dense causal attention, which S2-Attn is compared with: four ways to call torch's kernel with grouped queries.

The fastest of them is registered for transformers' models, whose default (`enable_gqa`) is the slowest here.

Shapes: B rows, T positions, H query heads, K key-value heads, R = H/K, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

ATTENTION = "bench_dense"


def with_gqa(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q_BHTD, k_BKTD, v_BKTD, is_causal=True, enable_gqa=True)


def repeated(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    """Keys and values are repeated in memory."""
    k_BHTD, v_BHTD = (x.repeat_interleave(q_BHTD.shape[1] // x.shape[1], 1) for x in (k_BKTD, v_BKTD))
    return F.scaled_dot_product_attention(q_BHTD, k_BHTD, v_BHTD, is_causal=True)


def contiguous(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    """As `repeated`, with queries copied so that each head is contiguous."""
    return repeated(q_BHTD.contiguous(), k_BKTD, v_BKTD)


def folded(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    """Key-value heads become rows of the batch; R query heads read the same memory through a stride of 0."""
    num_rows, num_kv_heads, num_tokens, width = k_BKTD.shape
    repeats = q_BHTD.shape[1] // num_kv_heads
    k, v = (x.reshape(-1, 1, num_tokens, width).expand(-1, repeats, -1, -1) for x in (k_BKTD, v_BKTD))
    q = q_BHTD.reshape(-1, repeats, num_tokens, width)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).reshape(num_rows, -1, num_tokens, width)


VARIANTS: Mapping[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "repeated": repeated,
    "contiguous": contiguous,
    "folded": folded,
    "enable_gqa": with_gqa,
}


def _forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **_: Any
) -> tuple[Tensor, None]:
    return repeated(query, key, value).transpose(1, 2), None


def _no_mask(*, attention_mask: Tensor | None = None, **_: Any) -> None:
    if attention_mask is not None:
        raise ValueError("the benchmark's rows are neither padded nor packed")


AttentionInterface.register(ATTENTION, _forward)
AttentionMaskInterface.register(ATTENTION, _no_mask)
