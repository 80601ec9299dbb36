"""RoPE parameters of an extended context."""

from __future__ import annotations

from loray.spec import RopeParameters, RopeScaling


def scaled(base: RopeParameters, scaling: RopeScaling, *, original_context: int, head_dim: int) -> RopeParameters:
    """The RoPE of `base`, scaled by `scaling` from `original_context` tokens.

    linear  positions ÷ factor (Chen et al., 2023)
    ntk     theta · factor^(d/(d−2)), frequencies stretched unevenly ("NTK-aware", static)
    yarn    by frequency band, with attention temperature (Peng et al., 2023)
    Raises ValueError for a base whose RoPE is scaled already (linear, llama3, yarn).
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
