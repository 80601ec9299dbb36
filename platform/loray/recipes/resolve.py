"""The context that a recipe trains for. Driver and publication ask for it too: nothing here loads a model."""

from __future__ import annotations

from loray.bases.registry import BaseModel
from loray.bases.rope import scaled
from loray.errors import UnsupportedError
from loray.spec import LongContext, RopeParameters, TrainSpec


def rope_parameters(base: BaseModel, long_context: LongContext) -> RopeParameters:
    """The base's RoPE, stretched as the recipe says: part of the published adapter."""
    original = long_context.extended_from(base.config.max_position_embeddings)
    try:
        return scaled(
            base.config.rope, long_context.rope_scaling, original_context=original, head_dim=base.config.head_dim
        )
    except ValueError as e:
        raise UnsupportedError(f"long_context on the base {base.name}: {e}") from e


def context_length(base: BaseModel, spec: TrainSpec) -> int:
    """Tokens that the adapter is trained for: original context × factor, or the base's own window."""
    if (long_context := spec.adapter.long_context) is None:
        return base.config.max_position_embeddings
    return long_context.context_length(base.config.max_position_embeddings)
