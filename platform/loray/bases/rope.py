"""RoPE frequencies as pure arithmetic: default, linear, YaRN (Peng et al., 2023) and Llama 3's, as transformers has them."""

from __future__ import annotations

import math

from loray.spec import RopeParameters, RopeScaling


def scaled(base: RopeParameters, scaling: RopeScaling, *, original_context: int, head_dim: int) -> RopeParameters:
    """The base's RoPE stretched by `scaling` from `original_context` tokens.

    linear  positions ÷ factor (Chen et al., 2023)
    ntk     theta · factor^(d/(d−2)), frequencies stretched unevenly ("NTK-aware", static)
    yarn    by frequency band, with attention temperature
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


def frequencies(rope: RopeParameters, head_dim: int) -> tuple[list[float], float]:
    """(inverse frequencies [head_dim/2], factor on cos and sin) in double precision."""
    half = head_dim // 2
    inv = [rope.rope_theta ** (-2 * i / head_dim) for i in range(half)]
    match rope.rope_type:
        case "default":
            return inv, 1.0
        case "linear":
            assert rope.factor is not None
            return [f / rope.factor for f in inv], 1.0
        case "llama3":
            return [_llama3(f, rope) for f in inv], 1.0
        case "yarn":
            return _yarn(inv, rope, head_dim)


def _llama3(inv: float, rope: RopeParameters) -> float:
    """Long waves are divided by `factor`, short ones kept, and those between are interpolated."""
    assert rope.factor and rope.low_freq_factor and rope.high_freq_factor and rope.original_max_position_embeddings
    context = rope.original_max_position_embeddings
    wavelength = 2 * math.pi / inv
    if wavelength > context / rope.low_freq_factor:
        return inv / rope.factor
    if wavelength < context / rope.high_freq_factor:
        return inv
    smooth = (context / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return (1 - smooth) * inv / rope.factor + smooth * inv


def _yarn(inv: list[float], rope: RopeParameters, head_dim: int) -> tuple[list[float], float]:
    """YaRN, equations 17 to 24: interpolate frequencies that turn less than `beta_slow` times in the context."""
    assert rope.factor and rope.original_max_position_embeddings
    fast, slow = rope.beta_fast or 32.0, rope.beta_slow or 1.0

    def dim_of(rotations: float) -> float:
        assert rope.original_max_position_embeddings
        turns = rope.original_max_position_embeddings / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.rope_theta))

    low = max(math.floor(dim_of(fast)), 0)
    high = min(math.ceil(dim_of(slow)), head_dim - 1)
    width = max(high - low, 0.001)
    out = []
    for i, f in enumerate(inv):
        keep = 1 - min(max((i - low) / width, 0.0), 1.0)
        out.append(f / rope.factor * (1 - keep) + f * keep)
    attention = rope.attention_factor
    if attention is None:
        attention = 0.1 * math.log(rope.factor) + 1.0 if rope.factor > 1 else 1.0
    return out, attention
