"""The model that a recipe trains: base weights, scaled RoPE, attention, adapter, gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from loray.adapters.inject import attach
from loray.bases.registry import BaseModel
from loray.recipes.resolve import Resolved, resolve
from loray.spec import TrainSpec
from loray.telemetry import get_logger
from loray.train.hook import ATTENTION
from loray.train.sequence import SequenceGroup
from loray.train.sequence.ring import RING

log = get_logger(__name__)

_DENSE = "sdpa"


def build_model(base: BaseModel, spec: TrainSpec) -> Any:
    """A transformers causal language model in `spec.dtype` with the recipe's adapter; only the adapter is trained.

    With `long_context`: RoPE scaled to the longer context, and S2-Attn until `dense` says otherwise.
    Raises UnsupportedError where the base's RoPE is scaled already.
    """
    config = AutoConfig.from_pretrained(base.path)
    config.use_cache = False
    attention = _DENSE
    resolved = resolve(spec, base.config)
    if resolved.rope is not None:
        attention = ATTENTION
        config.rope_parameters = resolved.rope.to_hf()
        config.max_position_embeddings = resolved.context
        config.s2_group_size = _checked_group(resolved)
    model = AutoModelForCausalLM.from_pretrained(
        base.path, config=config, dtype=getattr(torch, spec.dtype), attn_implementation=attention
    )
    model.config.name_or_path = base.name  # what an adapter is published under; never a path of this machine
    attach(model, spec.adapter, seed=spec.seed)
    if spec.gradient_checkpointing:
        # After `attach`, which may replace the embedding that gets the hook for input gradients.
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def _checked_group(resolved: Resolved) -> int:
    group_size = resolved.group_size
    assert group_size is not None
    if group_size < resolved.context // 4:
        log.warning(
            "group_size %d is less than a quarter of the context of %d tokens; LongLoRA's paper finds a worse loss",
            group_size,
            resolved.context,
        )
    return group_size


@contextmanager
def dense(model: Any, group: SequenceGroup | None = None) -> Iterator[None]:
    """Full causal attention inside, as in evaluation and serving.

    Over a sequence group of several ranks it passes keys and values along, in any model; each forward pass then runs
    inside `sequence_parallel` as well. Otherwise a model without S2-Attn stays as it is.
    """
    before = model.config._attn_implementation
    inside = _DENSE if before == ATTENTION else before
    if group is not None and group.size > 1:
        inside = RING
    if inside == before:
        yield
        return
    model.set_attn_implementation(inside)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


class ParameterCount(NamedTuple):
    """Elements; tied parameters count once."""

    total: int
    trainable: int


def count_parameters(model: nn.Module) -> ParameterCount:
    total = sum(p.numel() for p in model.parameters())
    return ParameterCount(total, sum(p.numel() for p in model.parameters() if p.requires_grad))
