"""Names of a Llama's modules in GGUF, the file format of llama.cpp, and the order of their rows.

H heads, P half of a head's rotary dimensions, O = 2HP rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# `blk.3.attn_q.weight` is Hugging Face's `model.layers.3.self_attn.q_proj.weight`.
LAYER_NAMES: Mapping[str, str] = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# The modules whose rows GGUF orders otherwise, by its architecture; in others none.
PERMUTED: Mapping[str, tuple[str, ...]] = {"llama": ("q_proj", "k_proj")}


def permuted(rows_OX: Tensor, head_dim: int) -> Tensor:
    """Put Hugging Face's rows (H, 2, P) in GGUF's order (H, P, 2): it interleaves the halves of a head's dimensions."""
    return _swapped(rows_OX, head_dim, 2)


def unpermuted(rows_OX: Tensor, head_dim: int) -> Tensor:
    """Put GGUF's rows in Hugging Face's order."""
    return _swapped(rows_OX, head_dim, head_dim // 2)


def _swapped(rows_OX: Tensor, head_dim: int, outer: int) -> Tensor:
    out, width = rows_OX.shape
    return rows_OX.reshape(out // head_dim, outer, head_dim // outer, width).transpose(1, 2).reshape(out, width)
