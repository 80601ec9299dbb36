"""Transformers' models of a base, and the model that a recipe trains: RoPE, attention, adapter, checkpointing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from loray.adapters.inject import attach
from loray.adapters.quantised import numel
from loray.bases.registry import BaseModel
from loray.planning.run import SHARDS_WEIGHTS
from loray.recipes.resolve import resolve
from loray.spec import DType, RopeParameters, TrainSpec
from loray.telemetry import get_logger
from loray.train.hooks.dense import DENSE
from loray.train.hooks.s2 import ATTENTION
from loray.train.sequence import SequenceGroup
from loray.train.weights.deferred import BaseWeights, stand_ins, without_weights
from loray.train.weights.quantised import read_quantised

log = get_logger(__name__)


def load_model(
    base: BaseModel,
    *,
    dtype: DType,
    rope: RopeParameters | None = None,
    attention: str = DENSE,
    config_fields: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """The base as a transformers causal language model on the CPU, without a KV cache.

    rope           None: the base's RoPE
    attention      name of an implementation that is registered with transformers
    config_fields  further fields of the model's configuration
    """
    return AutoModelForCausalLM.from_pretrained(
        base.path,
        config=model_config(base, rope, config_fields),
        dtype=getattr(torch, dtype),
        attn_implementation=attention,
    )


def model_config(base: BaseModel, rope: RopeParameters | None, fields: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Transformers' configuration of a base without a KV cache. `rope` None: the base's RoPE."""
    config = AutoConfig.from_pretrained(base.path)
    config.use_cache = False
    if rope is not None:
        config.rope_parameters = rope.to_hf()
    for name, value in fields.items():
        setattr(config, name, value)
    return config


def build_model(base: BaseModel, spec: TrainSpec) -> Any:
    """A transformers causal language model in `spec.dtype` with the recipe's adapter; only the adapter is trained.

    With `rope_scaling` RoPE is scaled to the longer context. With `attention.type` s2 attention is S2-Attn outside of
    `dense`, else dense everywhere. Where the strategy shards the base, its frozen parameters are on meta, and
    `strategies.prepare` reads them. Raises UnsupportedError where the base's RoPE cannot be scaled so.
    """
    resolved = resolve(spec, base.config)
    fields: dict[str, Any] = {}
    if resolved.rope is not None:
        fields["max_position_embeddings"] = resolved.context
    if resolved.group_size is not None:
        fields["s2_group_size"] = resolved.group_size
    if resolved.is_small_group:
        log.warning(
            "group_size %d is less than %d, a quarter of the context; LongLoRA's paper finds a worse loss",
            resolved.group_size,
            resolved.usual_group,
        )
    attention = DENSE if resolved.group_size is None else ATTENTION
    if spec.parallel.strategy in SHARDS_WEIGHTS:
        model = without_weights(model_config(base, resolved.rope, fields), dtype=spec.chosen_dtype, attention=attention)
        with stand_ins(model, BaseWeights(base, spec.chosen_dtype)):
            attach(model, spec.adapter, seed=spec.seed)
    elif spec.quantization is not None:
        model = without_weights(model_config(base, resolved.rope, fields), dtype=spec.chosen_dtype, attention=attention)
        read_quantised(model, BaseWeights(base, spec.chosen_dtype), spec.quantization)
        attach(model, spec.adapter, seed=spec.seed)
    else:
        model = load_model(base, dtype=spec.chosen_dtype, rope=resolved.rope, attention=attention, config_fields=fields)
        attach(model, spec.adapter, seed=spec.seed)
    model.config.name_or_path = base.name  # which goes into a published adapter, unlike a path of this machine
    if spec.gradient_checkpointing:
        # After `attach`, which may replace the embedding that gets the hook for input gradients.
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


@contextmanager
def dense(model: Any, group: SequenceGroup | None = None) -> Iterator[None]:
    """Full causal attention inside the block, as in evaluation and serving.

    Over a sequence group of several ranks, in any model, each forward pass must also run inside `sequence_parallel`.
    Without a group, a model without S2-Attn does not change.
    """
    before = model.config._attn_implementation
    inside = DENSE if before == ATTENTION or (group is not None and group.size > 1) else before
    if inside == before:
        yield
        return
    model.set_attn_implementation(inside)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """Full causal attention and evaluation mode inside the block; afterwards the model is as before."""
    was_training = model.training
    model.eval()
    try:
        with dense(model):
            yield
    finally:
        model.train(was_training)


class ParameterCount(NamedTuple):
    """Numbers of elements. Tied parameters count once."""

    total: int
    trainable: int


def count_parameters(model: nn.Module) -> ParameterCount:
    total = sum(numel(p) for p in model.parameters())
    return ParameterCount(total, sum(p.numel() for p in model.parameters() if p.requires_grad))
