"""RoPE's inverse frequencies, as transformers computes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loray.spec import RopeParameters


class Frequencies(NamedTuple):
    """Inverse frequencies, fp32 (head_dim/2), and the factor of cos and sin (YaRN's attention temperature)."""

    inverse_d: Tensor
    attention_factor: float


def frequencies(rope: RopeParameters, head_dim: int) -> Frequencies:
    """Equal to transformers' bit for bit; its functions compute all scaled kinds."""
    if rope.rope_type == "default":
        exponent_d = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return Frequencies(1.0 / (rope.rope_theta**exponent_d), 1.0)
    from transformers import LlamaConfig  # takes seconds, and few bases are of a scaled kind
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # The supported kinds do not use the model's context length; transformers warns if it does not fit.
    context = round((rope.original_max_position_embeddings or 1 << 20) * (rope.factor or 1))
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=head_dim,
        rope_parameters=rope.to_hf(),
        max_position_embeddings=context,
    )
    inverse_d, attention_factor = ROPE_INIT_FUNCTIONS[rope.rope_type](config, torch.device("cpu"))
    return Frequencies(inverse_d, float(attention_factor))
