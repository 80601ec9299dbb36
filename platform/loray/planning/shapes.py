"""Shapes of base models: of those that need not be on this machine to plan for, and how many elements each has."""

from __future__ import annotations

from dataclasses import dataclass

from loray.bases.config import ModelConfig
from loray.spec import AdapterSpec, VeraSpec

SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))


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
