"""What a recipe leaves to its base, decided once: context, RoPE, group and row length. Nothing here loads a model."""

from __future__ import annotations

from dataclasses import dataclass

from loray.bases.config import ModelConfig
from loray.bases.rope import scaled
from loray.errors import SpecError, UnsupportedError
from loray.spec import RopeParameters, TrainSpec

_MAX_LENGTH = 1024


@dataclass(frozen=True, slots=True)
class Resolved:
    """Lengths in tokens.

    context           that the adapter is trained for: original context × factor, or the base's own window
    original_context  that is extended; the base's own window where nothing is
    row_length        N of the longest row
    group_size        S2-Attn's G; None where attention is dense
    rope              the base's RoPE, stretched: part of the published adapter; None where the adapter keeps the base's
    """

    context: int
    original_context: int
    row_length: int
    group_size: int | None
    rope: RopeParameters | None


def resolve(spec: TrainSpec, model: ModelConfig) -> Resolved:
    """What `spec` means on `model`, its base.

    `data.max_length` bounds a row. Where it is not given, a long-context adapter gets rows of its whole context, and
    another one rows of 1,024 tokens, or of the base's window where that is shorter.

    Raises SpecError where rows would be longer than the context, UnsupportedError where RoPE cannot be scaled.
    """
    window, long_context = model.max_position_embeddings, spec.adapter.long_context
    if long_context is None:
        row_length = _row_length(spec, window, default=min(_MAX_LENGTH, window))
        return Resolved(window, window, row_length, group_size=None, rope=None)
    original, context = long_context.extended_from(window), long_context.context_length(window)
    try:
        rope = scaled(model.rope, long_context.rope_scaling, original_context=original, head_dim=model.head_dim)
    except ValueError as e:
        raise UnsupportedError(f"long_context on the base {spec.base}: {e}") from e
    row_length = _row_length(spec, context, default=context)
    return Resolved(context, original, row_length, long_context.group_size or quarter(context), rope)


def quarter(context: int) -> int:
    """The group of LongLoRA's paper: a quarter of the context, rounded down to an even number."""
    return max(2, context // 4 // 2 * 2)


def _row_length(spec: TrainSpec, context: int, *, default: int) -> int:
    if (max_length := spec.data.max_length) is None:
        return default
    if max_length > context:
        hint = "" if spec.adapter.long_context else f", or extend {spec.base} with method longlora"
        raise SpecError(
            f"data.max_length is {max_length}, but the adapter's context is {context} tokens; lower it{hint}"
        )
    return max_length
