"""Shapes of base models: of those that need not be on this machine to plan for, and how many elements each has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from loray.bases.config import ModelConfig
from loray.spec import AdapterSpec, VeraSpec

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))

_LLAMA_2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
}
# As `loray base add meta-llama/NAME` would call them; the published config.json files.
_PRESETS: Mapping[str, dict[str, Any]] = {
    "Llama-2-7b-hf": _LLAMA_2
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "Llama-2-13b-hf": _LLAMA_2
    | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "Llama-2-70b-hf": _LLAMA_2
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "Meta-Llama-3-8B": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "smollm2": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "rope_theta": 100000.0,
        "tie_word_embeddings": True,
    },
}


def preset_names() -> list[str]:
    return sorted(_PRESETS)


def preset(name: str) -> ModelConfig | None:
    """The configuration of a well-known base, or None."""
    return ModelConfig.from_hf(_PRESETS[name]) if name in _PRESETS else None


@dataclass(frozen=True, slots=True)
class BaseCounts:
    """Elements of a base's parameters. `head` is 0 where input and output embeddings are tied; `layer` is one layer,
    `layer_norms` the part of it that RMSNorms hold.
    """

    embedding: int
    head: int
    layer: int
    layer_norms: int
    final_norm: int
    num_layers: int

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.num_layers * self.layer + self.final_norm

    @property
    def norms(self) -> int:
        return self.num_layers * self.layer_norms + self.final_norm


@dataclass(frozen=True, slots=True)
class TrainedCounts:
    """Elements of what an adapter trains: its own vectors and matrices, the input embedding, all norms."""

    adapter: int
    embedding: int
    norms: int
    largest: int

    @property
    def total(self) -> int:
        return self.adapter + self.embedding + self.norms


def count_base(model: ModelConfig) -> BaseCounts:
    norms = 2 * model.hidden_size + (2 * model.head_dim if model.qk_norm else 0)
    biases = (model.num_heads + 2 * model.num_kv_heads) * model.head_dim if model.qkv_bias else 0
    embedding = model.vocab_size * model.hidden_size
    matrices = model.num_matrix_elements - embedding  # the output head's are as many as the input embedding's
    return BaseCounts(
        embedding=embedding,
        head=0 if model.tie_word_embeddings else embedding,
        layer=matrices // model.num_layers + norms + biases,
        layer_norms=norms,
        final_norm=model.hidden_size,
        num_layers=model.num_layers,
    )


def count_trained(model: ModelConfig, adapter: AdapterSpec) -> TrainedCounts:
    base = count_base(model)
    shapes = [model.module_shape(module) for module in adapter.target_modules]
    if isinstance(adapter, VeraSpec):
        tensors = [n for out, _ in shapes for n in (out, adapter.rank)]
    else:
        tensors = [adapter.rank * n for out_in in shapes for n in out_in]
    extras = adapter.long_context
    embedding = base.embedding if extras is not None and extras.train_embeddings else 0
    norms = base.norms if extras is not None and extras.train_norms else 0
    return TrainedCounts(model.num_layers * sum(tensors), embedding, norms, max(embedding, *tensors))


def count_factors(model: ModelConfig, adapter: AdapterSpec) -> int:
    """Elements of A and B that a token is multiplied with in one layer. VeRA's A is one for all modules, and its
    product is computed once for those that have the same input, unless dropout gives each an input of its own.
    """
    targets = adapter.target_modules
    outs = sum(model.module_shape(module)[0] for module in targets)
    widths = {module: model.module_shape(module)[1] for module in targets}
    if isinstance(adapter, VeraSpec) and not adapter.dropout:
        first = (next((m for m in same if m in widths), None) for same in SAME_INPUT)
        widths = {module: widths[module] for module in first if module is not None}
    return adapter.rank * (outs + sum(widths.values()))


def count_vera_pair(model: ModelConfig, adapter: AdapterSpec) -> int:
    """Elements of VeRA's frozen pair, which all modules share; 0 for the other methods."""
    if not isinstance(adapter, VeraSpec):
        return 0
    shapes = [model.module_shape(module) for module in adapter.target_modules]
    return adapter.rank * (max(out for out, _ in shapes) + max(width for _, width in shapes))
