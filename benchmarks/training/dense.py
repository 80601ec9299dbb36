"""Dense causal attention, which S2-Attn is compared with: loray's own, and four ways to call torch's kernel with
grouped queries.

Shapes: B rows, T positions, H query heads, K key-value heads, R = H/K, D head width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor

from loray.train import s2_attention


def ours(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor) -> Tensor:
    """Groups of twice the row: what a model trains with where its attention is dense."""
    return s2_attention(q_BHTD, k_BKTD, v_BKTD, group_size=2 * q_BHTD.shape[2])


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
    "ours": ours,
    "repeated": repeated,
    "contiguous": contiguous,
    "folded": folded,
    "enable_gqa": with_gqa,
}
