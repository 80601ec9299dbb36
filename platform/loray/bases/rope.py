"""RoPE: the parameters of a stretched context, and the frequencies that parameters mean."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loray.spec import RopeParameters, RopeScaling


def scaled(base: RopeParameters, scaling: RopeScaling, *, original_context: int, head_dim: int) -> RopeParameters:
    """The base's RoPE stretched by `scaling` from `original_context` tokens.

    linear  positions ÷ factor (Chen et al., 2023)
    ntk     theta · factor^(d/(d−2)), frequencies stretched unevenly ("NTK-aware", static)
    yarn    by frequency band, with attention temperature (Peng et al., 2023)
    A base that is scaled already (llama3, yarn) has no second scaling defined: ValueError.
    """
    if base.rope_type != "default":
        raise ValueError(f"the base's RoPE is {base.rope_type!r} already; scaling it again is not defined")
    match scaling.type:
        case "linear":
            return RopeParameters(rope_type="linear", rope_theta=base.rope_theta, factor=scaling.factor)
        case "ntk":
            theta = base.rope_theta * scaling.factor ** (head_dim / (head_dim - 2))
            return RopeParameters(rope_theta=theta)
        case "yarn":
            return RopeParameters(
                rope_type="yarn",
                rope_theta=base.rope_theta,
                factor=scaling.factor,
                original_max_position_embeddings=original_context,
            )


class Frequencies(NamedTuple):
    """Inverse frequencies, fp32 (head_dim/2), and the factor on cos and sin (YaRN's attention temperature)."""

    inverse_d: Tensor
    attention_factor: float


def frequencies(rope: RopeParameters, head_dim: int) -> Frequencies:
    """Bit-equal to transformers', whose functions compute every scaled kind."""
    if rope.rope_type == "default":
        exponent_d = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        return Frequencies(1.0 / (rope.rope_theta**exponent_d), 1.0)
    from transformers import LlamaConfig  # takes seconds, and bases are seldom of a scaled kind
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    # No covered kind derives its frequencies from the model's context length; transformers warns if it does not fit.
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
