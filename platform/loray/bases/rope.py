"""RoPE parameters of an extended context."""

from __future__ import annotations

import math

from loray.spec import RopeParameters, RopeScaling


def scaled(base: RopeParameters, scaling: RopeScaling, *, original_context: int, head_dim: int) -> RopeParameters:
    """The RoPE of `base`, scaled by `scaling` from `original_context` tokens.

    linear  positions ÷ factor (Chen et al., 2023)
    ntk     theta · factor^(d/(d−2)), frequencies stretched unevenly ("NTK-aware", static)
    yarn    by frequency band, with attention temperature (Peng et al., 2023)
    A base that is scaled already is scaled further: factors of linear and of yarn multiply, each on a base of its own
    type, and ntk stretches theta under any type. Raises ValueError for other combinations, which are no RoPE that
    transformers computes.
    """
    match scaling.type, base.rope_type:
        case "linear", "default" | "linear":
            factor = scaling.factor * (base.factor or 1.0)
            return RopeParameters(rope_type="linear", rope_theta=base.rope_theta, factor=factor)
        case "ntk", _:
            return base.model_copy(
                update={"rope_theta": base.rope_theta * scaling.factor ** (head_dim / (head_dim - 2))}
            )
        case "yarn", "default":
            return RopeParameters(
                rope_type="yarn",
                rope_theta=base.rope_theta,
                factor=scaling.factor,
                original_max_position_embeddings=original_context,
            )
        case "yarn", "yarn":  # the temperature is that of the whole factor
            return base.model_copy(update={"factor": scaling.factor * (base.factor or 1.0), "attention_factor": None})
    raise ValueError(
        f"its RoPE is {base.rope_type!r} already, which {scaling.type} cannot scale further: take type: ntk, or leave "
        "rope_scaling out"
    )


def extended_context(rope: RopeParameters, base: RopeParameters, *, original_context: int, head_dim: int) -> int:
    """Tokens to which `rope` extends `original_context` tokens of `base`: the inverse of `scaled`, rounded up."""
    stretched: float = (rope.rope_theta / base.rope_theta) ** ((head_dim - 2) / head_dim)
    divided = (rope.factor or 1.0) / (base.factor or 1.0)
    return math.ceil(original_context * max(1.0, stretched) * max(1.0, divided))
