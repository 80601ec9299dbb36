"""Transformers' models of a base, and the model that a recipe trains: RoPE, attention, adapter, checkpointing.

Where a strategy shards the base, frozen parameters are on torch's meta device, shapes without memory, until
`replace_parameters` fills them, so that no process holds the whole base. Adapters and what else is trained are whole on
every rank, as in any model: the same seed gives the same weights.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from loray.bases.quantized import check_installed, linear_4bit, numel
from loray.bases.registry import BaseModel
from loray.bases.weights import WeightSource
from loray.methods.attach import BASE_ROWS, attach
from loray.methods.lora_module import begin_all
from loray.planning.run import SHARDS_WEIGHTS
from loray.recipes.resolve import resolve
from loray.spec import DType, QuantizationSpec, RopeParameters, TrainSpec
from loray.telemetry import get_logger
from loray.train.hooks import ATTENTION, DENSE
from loray.train.sequence import SequenceGroup

log = get_logger(__name__)


def build_model(base: BaseModel, spec: TrainSpec) -> Any:
    """Make a transformers causal language model in `spec.dtype` with the recipe's adapter; only the adapter is trained.

    With `rope_scaling` RoPE is scaled to the longer context. With `attention.type` s2 attention is S2-Attn outside of
    `dense`, else dense everywhere. Where the strategy shards the base, its frozen parameters are on meta, and
    `strategies.prepare` reads them. Raises UnsupportedError where the base's RoPE cannot be scaled so.
    """
    model = trained_base(base, spec)
    if spec.parallel.strategy in SHARDS_WEIGHTS:
        with stand_ins(model, BaseWeights(base, spec.chosen_dtype)):
            attach(model, spec.adapter, seed=spec.seed)
    else:
        attach(model, spec.adapter, seed=spec.seed)
    if spec.gradient_checkpointing:
        # After `attach`, which may replace the embedding that gets the hook for input gradients.
        model.activation_checkpointing_enable({"use_reentrant": False})
    return model


def trained_base(base: BaseModel, spec: TrainSpec) -> Any:
    """Make the model of `build_model` before it has an adapter and without checkpointing of activations: on meta where
    the strategy shards the base.
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
    if spec.parallel.strategy in SHARDS_WEIGHTS or spec.quantization is not None:
        model = without_weights(model_config(base, resolved.rope, fields), dtype=spec.chosen_dtype, attention=attention)
        if spec.quantization is not None:
            read_quantized(model, BaseWeights(base, spec.chosen_dtype), spec.quantization)
    else:
        model = load_model(base, dtype=spec.chosen_dtype, rope=resolved.rope, attention=attention, config_fields=fields)
    model.config.name_or_path = base.name  # which goes into a published adapter, unlike a path of this machine
    return model


def load_model(
    base: BaseModel,
    *,
    dtype: DType,
    rope: RopeParameters | None = None,
    attention: str = DENSE,
    config_fields: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """Load the base as a transformers causal language model on the CPU, without a KV cache.

    rope           None: the base's RoPE
    attention      name of an implementation that is registered with transformers
    config_fields  further fields of the model's configuration

    A quantised base is dequantised: it computes with the values that it has, in 16 or 32 bits.
    """
    config = model_config(base, rope, config_fields)
    if base.config.quantization is not None:
        weights = BaseWeights(base, dtype)
        model = without_weights(config, dtype=dtype, attention=attention)
        replace_parameters(model, lambda name, _: weights.read(name).clone())
        return model
    return AutoModelForCausalLM.from_pretrained(
        base.path,
        config=config,
        dtype=getattr(torch, dtype),
        attn_implementation=_implementation(config, attention),
    )


def _implementation(config: Any, attention: str) -> str:
    """Choose an implementation of attention: with sinks it is transformers' own, op by op."""
    return "eager" if config.model_type == "gpt_oss" else attention


def model_config(base: BaseModel, rope: RopeParameters | None, fields: Mapping[str, Any] = MappingProxyType({})) -> Any:
    """Make transformers' configuration of a base without a KV cache. `rope` None: the base's RoPE."""
    config = AutoConfig.from_pretrained(base.path)
    config.use_cache = False
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # weights are read dequantised
    if rope is not None:
        config.rope_parameters = base.config.hf_rope(rope)
    for name, value in fields.items():
        setattr(config, name, value)
    return config


@contextmanager
def dense(model: Any, group: SequenceGroup | None = None) -> Iterator[None]:
    """Give the model full causal attention inside the block, as in evaluation and serving.

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
    """Give the model full causal attention and evaluation mode inside the block."""
    was_training = model.training
    model.eval()
    try:
        with dense(model):
            yield
    finally:
        model.train(was_training)


@contextmanager
def unscaled(model: Any, base: BaseModel) -> Iterator[None]:
    """Give the model the base's RoPE inside the block: an untrained model then computes as the base does."""
    inner = model.base_model
    scaled = inner.rotary_emb
    config = copy.deepcopy(model.config)
    config.rope_parameters = base.config.hf_rope()
    inner.rotary_emb = type(scaled)(config).to(next(scaled.buffers()).device)
    try:
        yield
    finally:
        inner.rotary_emb = scaled


class ParameterCount(NamedTuple):
    """Numbers of elements. Tied parameters count once."""

    total: int
    trainable: int


def count_parameters(model: nn.Module) -> ParameterCount:
    total = sum(numel(p) for p in model.parameters())
    return ParameterCount(total, sum(p.numel() for p in model.parameters() if p.requires_grad))


# -- models whose weights are read later ------------------------------------------------------------------------------

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_EXPERTS = re.compile(r"(?P<path>.+\.experts)\.(?P<matrix>gate_up|down)_proj")  # a parameter with those of all experts
_MATRICES = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}


class BaseWeights:
    """Tensors of a base's checkpoint in `dtype`, by the names of a model's parameters, with an adapter or without."""

    def __init__(self, base: BaseModel, dtype: DType) -> None:
        self._source = WeightSource(base.path, base.config)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._is_tied, self._experts = base.config.tie_word_embeddings, base.config.experts

    def has(self, name: str) -> bool:
        """True where the parameter is the base's and not the adapter's."""
        stored = self._stored(name)
        return stored in self._source or _EXPERTS.fullmatch(stored) is not None

    def read(self, name: str) -> Tensor:
        """Read the whole tensor; a view of the mapped file where it is stored in the dtype."""
        stored = self._stored(name)
        if self._experts is not None and stored not in self._source:
            return self.read_rows(name, 0, self._experts.num)
        return self._source.dense(stored).to(self._dtype)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read its rows from `start` up to `stop` alone."""
        stored = self._stored(name)
        found = None if stored in self._source else _EXPERTS.fullmatch(stored)
        if found is None:
            return self._source.dense_rows(stored, start, stop).to(self._dtype)
        paths = [f"{found['path']}.{expert}" for expert in range(start, stop)]
        modules = _MATRICES[found["matrix"]]
        experts = [torch.cat([self._source.dense(f"{path}.{module}.weight") for module in modules]) for path in paths]
        return torch.stack(experts).to(self._dtype)

    def _stored(self, name: str) -> str:
        stored = name.replace(".base_layer", "")  # PEFT's and VeRA's modules around the base's
        return _EMBEDDING if self._is_tied and stored == _HEAD else stored


def without_weights(config: Any, *, dtype: DType, attention: str) -> Any:
    """Make the causal language model of a transformers configuration. Parameters are on meta, buffers on the CPU."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, dtype), attn_implementation=_implementation(config, attention)
        )
    for path, module in list(model.named_modules()):
        if hasattr(module, "scalar_embed_scale"):  # Gemma's embedding
            module.embed_scale = torch.tensor(module.scalar_embed_scale)
        elif any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # RoPE's frequencies
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, type(module)(config=model.config))
    return model.eval()


@contextmanager
def stand_ins(model: nn.Module, weights: BaseWeights) -> Iterator[None]:
    """Give `model`, whose parameters are on meta, an adapter inside the block.

    There each parameter is one element on the CPU that stands for all: modules that are added are made on the CPU, as
    they are beside real weights. Afterwards what is trained of the base is read, and the rest is on meta again.
    """
    replace_parameters(model, lambda _, p: torch.zeros((), dtype=p.dtype).expand(p.shape))
    yield
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and weights.has(name):
                parameter.data = weights.read(name).clone()
        for path, module in model.named_modules():
            if hasattr(module, BASE_ROWS):
                getattr(module, BASE_ROWS).copy_(weights.read(f"{path}.weight"))
    begin_all(model, weights.read)
    # An element that stands for more has less memory than the parameter.
    replace_parameters(
        model, lambda _, p: torch.empty_like(p, device="meta") if p.untyped_storage().nbytes() < p.nbytes else None
    )


@torch.no_grad()
def replace_parameters(
    model: nn.Module,
    make: Callable[[str, nn.Parameter], Tensor | None],
    then: Callable[[nn.Parameter], object] = lambda parameter: None,
) -> None:
    """Replace each parameter by `make(name, parameter)`, and call `then` with the new one before the next is made.

    None leaves it. Tied parameters stay tied, and what is trained stays trained.
    """
    owners: dict[nn.Parameter, list[tuple[nn.Module, str, str]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(parameter, []).append((module, name, f"{path}.{name}".removeprefix(".")))
    for parameter, places in owners.items():
        tensor = make(places[0][2], parameter)
        if tensor is None:
            continue
        replacement = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
        for module, name, _ in places:
            setattr(module, name, replacement)
        then(replacement)


def read_quantized(model: Any, weights: BaseWeights, spec: QuantizationSpec) -> None:
    """Fill `model`, whose parameters are on meta. The output head stays as it is stored.

    Raises UnsupportedError where bitsandbytes is missing.
    """
    check_installed()
    head = model.get_output_embeddings()
    for path, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            bias = None if module.bias is None else weights.read(f"{path}.bias").clone()
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, linear_4bit(weights.read(f"{path}.weight"), bias, spec))
    replace_parameters(model, lambda name, p: weights.read(name).clone() if p.is_meta else None)
