"""Values of a recipe that depend on its base, its parent or the hardware: context, RoPE, group, row length, dtype."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from loray.bases.config import ARCHITECTURES, ModelConfig, scaled
from loray.errors import SpecError, UnsupportedError
from loray.machine import Hardware, training_dtype
from loray.methods import method_of
from loray.spec import MAX_CONTEXT, AdapterManifest, BatchSpec, RopeParameters, RopeScaling, TrainSpec

_MAX_LENGTH = 1024


class OnHardware(NamedTuple):
    """A recipe whose `dtype` and `use_gpu` are chosen, and why its dtype is what it is."""

    spec: TrainSpec
    why: str


def on_hardware(spec: TrainSpec, hardware: Hardware) -> OnHardware:
    """Choose the dtype and the device that a recipe leaves to the hardware of its workers: GPUs where there is one for
    each worker.
    """
    use_gpu = len(hardware.gpus) >= spec.num_workers if spec.use_gpu == "auto" else spec.use_gpu
    chosen = training_dtype(hardware, use_gpu=use_gpu)
    if spec.dtype != "auto":
        return OnHardware(spec.model_copy(update={"use_gpu": use_gpu}), "the recipe says so")
    return OnHardware(spec.model_copy(update={"use_gpu": use_gpu, "dtype": chosen.dtype}), chosen.why)


@dataclass(frozen=True, slots=True)
class Resolved:
    """Lengths in tokens.

    context           context that the adapter is trained for: original context × factor, or the base's own context
    original_context  context before it is extended; equal to `context` where it is not
    row_length        N, length of the longest row
    group_size        S2-Attn's G; None where attention is dense
    usual_group       G of LongLoRA's paper: a quarter of the context, or of N where the context is not extended
    rope              scaled RoPE, part of the published adapter; None where the adapter keeps the base's RoPE
    """

    context: int
    original_context: int
    row_length: int
    group_size: int | None
    usual_group: int
    rope: RopeParameters | None

    @property
    def is_small_group(self) -> bool:
        """True where G is less than a quarter of the context: LongLoRA's paper finds that this raises the loss."""
        return self.group_size is not None and self.group_size < self.usual_group


def resolve(spec: TrainSpec, model: ModelConfig) -> Resolved:
    """Resolve `spec` on `model`, its base.

    `data.max_length` bounds a row. Without it, a row of LongLoRA, or of any method with `rope_scaling`, has up to the
    whole context, and another row up to 1,024 tokens, or the base's context where that is shorter.

    Raises SpecError where the adapter does not fit the base, where rows would be longer than the context, or shorter
    than the workers that share them are many, and UnsupportedError where RoPE cannot be scaled.
    """
    for problem in method_of(spec.adapter).problems(spec.adapter, model):
        raise SpecError(problem)
    if spec.quantization is not None and model.quantization is not None:
        raise SpecError(f"the base {spec.base} is quantised already ({model.quantization}): leave quantization out")
    if model.layers[0].has_sinks and (spec.attention.type != "dense" or spec.parallel.sequence > 1):
        raise SpecError(
            f"attention of {model.architecture} has sinks, which only dense attention over whole rows has: set "
            "attention.type: dense and parallel.sequence: 1"
        )
    original = context = model.max_position_embeddings
    scaling, rope = spec.rope_scaling, None
    if scaling is not None:
        original, context = scaling.extended_from(original), scaling.context_length(original)
        if context > MAX_CONTEXT:
            raise SpecError(f"rope_scaling makes a context of {context:,} tokens; at most {MAX_CONTEXT:,} are served")
        try:
            rope = scaled(model.rope, scaling, original_context=original, head_dim=model.head_dim)
        except ValueError as e:
            raise UnsupportedError(f"rope_scaling on the base {spec.base}: {e}") from e
        if rope.rope_type not in ARCHITECTURES[model.architecture].ropes:
            raise UnsupportedError(
                f"rope_scaling on the base {spec.base}: transformers has no {rope.rope_type} RoPE for "
                f"{model.architecture}: take type: ntk, or leave rope_scaling out"
            )
    row_length = _row_length(spec, context, default=context if spec.is_long_context else min(_MAX_LENGTH, context))
    if spec.parallel.sequence > row_length:
        raise SpecError(
            f"parallel.sequence is {spec.parallel.sequence}, more than the {row_length} tokens of a row, of which "
            "every worker is to hold a part; lower it"
        )
    windows = [layer.window for layer in model.layers if layer.window is not None and layer.window < row_length]
    if model.attention_soft_cap is not None and (spec.parallel.sequence > 1 or spec.attention.type == "s2"):
        raise SpecError(
            f"attention of the base {spec.base} has a soft cap, which neither S2-Attn nor attention over a sequence "
            "group has: set attention.type: dense and parallel.sequence: 1"
        )
    if windows and spec.parallel.sequence > 1:
        raise SpecError(
            f"parallel.sequence is {spec.parallel.sequence}, but layers of the base {spec.base} have a window of "
            f"{windows[0]} tokens, which only whole rows have: set it to 1, or data.max_length to {windows[0]}"
        )
    if spec.attention.type == "s2" and len(windows) == model.num_layers:
        raise SpecError(
            f"every layer of the base {spec.base} has a window of {windows[0]} tokens, so S2-Attn would change "
            "nothing: set attention.type: dense"
        )
    usual_group = quarter(row_length if rope is None else context)
    group_size = None if spec.attention.type == "dense" else spec.attention.group_size or usual_group
    return Resolved(context, original, row_length, group_size, usual_group, rope)


def quarter(context: int) -> int:
    """Compute the group size of LongLoRA's paper: a quarter of the context, rounded down to an even number."""
    return max(2, context // 4 // 2 * 2)


def check_token_budget(batch: BatchSpec, row_length: int) -> None:
    """Raise SpecError where a row of `row_length` tokens does not fit into a micro-batch of `batch.tokens`."""
    if batch.tokens is not None and row_length > batch.tokens:
        raise SpecError(
            f"batch.tokens is {batch.tokens}, less than a row of {row_length} tokens; raise it, or lower "
            "data.max_length"
        )


def check_row_lengths(
    spec: TrainSpec, typical: float, row_length: int, *, are_texts: bool, trained_context: int | None = None
) -> None:
    """Raise SpecError where the median row of a long context, which has `typical` tokens, has less than half of the
    `row_length` that are planned and paid for: the positions that the run is about would hardly be trained.

    Texts that are packed count by their documents, in which positions start anew. Chats and completions may be packed,
    and tune an adapter whose positions its parent was trained on: `trained_context` of them.
    """
    order = spec.batch.order
    is_trained = trained_context is not None and trained_context >= row_length
    if not spec.is_long_context or (not are_texts and (order == "packed" or is_trained)):
        return
    if 2 * typical >= row_length:
        return
    if order == "concat":
        fix = "give more text, or lower data.max_length"
    elif are_texts:
        fix = "set batch.order: concat, which joins texts, or lower data.max_length to what they need"
    else:
        fix = "set batch.order: packed, give longer rows, or lower data.max_length to what they need"
    raise SpecError(
        f"half of the rows have {typical:,.0f} tokens or fewer, of {row_length:,} that they may have: positions after "
        f"that are hardly trained; {fix}"
    )


def _row_length(spec: TrainSpec, context: int, *, default: int) -> int:
    if (max_length := spec.data.max_length) is None:
        return default
    if max_length > context:
        hint = "" if spec.rope_scaling else f", or extend {spec.base} with rope_scaling"
        raise SpecError(
            f"data.max_length is {max_length}, but the adapter's context is {context} tokens; lower it{hint}"
        )
    return max_length


def continued(spec: TrainSpec, parent: AdapterManifest, label: str, model: ModelConfig) -> TrainSpec:
    """Give `spec` the version and the RoPE of `parent`, its `init_adapter`, which is called `label`, and the adapter as
    which an equal recipe has published it.

    The parent's matrices hold under its own RoPE, so the run has the same. A parent with the base's RoPE may be
    extended, and one that is extended may be extended further: by the same type from the same context, with a larger
    factor. Raises SpecError where `spec` says otherwise.
    """
    if parent.method != spec.adapter.method:
        raise SpecError(
            f"init_adapter {label} is a {parent.method} adapter, and adapter.method is {spec.adapter.method}: train "
            "the same method"
        )
    scaling = spec.rope_scaling
    if parent.rope_parameters is not None and scaling is None:
        scaling = None if parent.recipe is None else parent.recipe.rope_scaling
        if scaling is None:
            raise SpecError(
                f"init_adapter {label} has a RoPE of its own and no recipe that says how it was scaled: give "
                "rope_scaling"
            )
    adapter = spec.adapter.published
    spec = spec.model_copy(update={"init_adapter": label, "rope_scaling": scaling, "adapter": adapter})
    if parent.rope_parameters is None or resolve(spec, model).rope == parent.rope_parameters:
        return spec
    if not _extends_further(scaling, parent.recipe, model.max_position_embeddings):
        raise SpecError(
            f"rope_scaling gives another RoPE than init_adapter {label} was trained with: leave it out, or "
            "extend it further (its type and original_context, a larger factor)"
        )
    return spec


def _extends_further(scaling: RopeScaling | None, parent: TrainSpec | None, window: int) -> bool:
    before = None if parent is None else parent.rope_scaling
    if scaling is None or before is None:
        return False
    is_same = scaling.type == before.type and scaling.extended_from(window) == before.extended_from(window)
    return is_same and scaling.factor > before.factor
