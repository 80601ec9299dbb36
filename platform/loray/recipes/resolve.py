"""The values of a recipe that depend on its base: context, RoPE, group and row length. Nothing here loads a model."""

from __future__ import annotations

from dataclasses import dataclass

from loray.bases.config import ModelConfig
from loray.bases.rope import scaled
from loray.errors import SpecError, UnsupportedError
from loray.spec import BatchSpec, RopeParameters, TrainSpec

_MAX_LENGTH = 1024


@dataclass(frozen=True, slots=True)
class Resolved:
    """Lengths in tokens.

    context           context that the adapter is trained for: original context × factor, or the base's own context
    original_context  context before it is extended; equal to `context` where it is not
    row_length        N, length of the longest row
    group_size        S2-Attn's G; None where attention is dense
    rope              scaled RoPE, part of the published adapter; None where the adapter keeps the base's RoPE
    """

    context: int
    original_context: int
    row_length: int
    group_size: int | None
    rope: RopeParameters | None


def resolve(spec: TrainSpec, model: ModelConfig) -> Resolved:
    """The values of `spec` on `model`, its base.

    `data.max_length` bounds a row. Without it, a row of a long-context adapter has up to the whole context, and a row
    of another adapter up to 1,024 tokens, or the base's context where that is shorter.

    Raises SpecError where rows would be longer than the context, and UnsupportedError where RoPE cannot be scaled.
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
    """Group size of LongLoRA's paper: a quarter of the context, rounded down to an even number."""
    return max(2, context // 4 // 2 * 2)


def is_small_group(group_size: int, context: int) -> bool:
    """Whether a group is less than a quarter of the context: LongLoRA's paper finds that this raises the loss."""
    return group_size < quarter(context)


def check_token_budget(batch: BatchSpec, row_length: int) -> None:
    """Raise SpecError where a row of `row_length` tokens does not fit into a micro-batch of `batch.tokens`."""
    if batch.tokens is not None and row_length > batch.tokens:
        raise SpecError(
            f"batch.tokens is {batch.tokens}, less than a row of {row_length} tokens; raise it, or lower "
            "data.max_length"
        )


def _row_length(spec: TrainSpec, context: int, *, default: int) -> int:
    if (max_length := spec.data.max_length) is None:
        return default
    if max_length > context:
        hint = "" if spec.adapter.long_context else f", or extend {spec.base} with method longlora"
        raise SpecError(
            f"data.max_length is {max_length}, but the adapter's context is {context} tokens; lower it{hint}"
        )
    return max_length
