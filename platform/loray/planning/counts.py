"""Numbers of elements: parameters of a base, trained parameters of an adapter, and VeRA's shared pair."""

from __future__ import annotations

from dataclasses import dataclass

from loray.bases.config import ModelConfig
from loray.spec import LINEAR_MODULES, MODULES_BY_INPUT, AdapterSpec, DoraSpec, VeraSpec


@dataclass(frozen=True, slots=True)
class BaseCounts:
    """Elements of a base's parameters.

    head         output head; 0 where it is tied to the input embedding
    layer        one decoder layer, norms included
    layer_norms  the RMSNorms of one layer
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
    """Elements of the parameters that an adapter trains. `largest` is the largest tensor among them.

    adapter    matrices and vectors of the adapter's modules
    embedding  the input embedding; 0 where it is not trained
    norms      all RMSNorms; 0 where they are not trained
    """

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
    matrices = model.num_matrix_elements - embedding  # the output head is as large as the input embedding
    return BaseCounts(
        embedding=embedding,
        head=0 if model.tie_word_embeddings else embedding,
        layer=matrices // model.num_layers + norms + biases,
        layer_norms=norms,
        final_norm=model.hidden_size,
        num_layers=model.num_layers,
    )


def count_quantised(model: ModelConfig) -> int:
    """Elements of the decoder's linear layers, which a quantised base has in 4 bits."""
    shapes = (model.module_shape(module) for module in LINEAR_MODULES)
    return model.num_layers * sum(out * width for out, width in shapes)


def count_trained(model: ModelConfig, adapter: AdapterSpec) -> TrainedCounts:
    base = count_base(model)
    shapes = [model.module_shape(module) for module in adapter.target_modules]
    if isinstance(adapter, VeraSpec):
        tensors = [n for out, _ in shapes for n in (out, adapter.rank)]
    else:
        tensors = [adapter.rank * n for out_in in shapes for n in out_in]
        tensors += [out for out, _ in shapes if isinstance(adapter, DoraSpec)]
    embedding = base.embedding if adapter.train_embeddings else 0
    norms = base.norms if adapter.train_norms else 0
    return TrainedCounts(model.num_layers * sum(tensors), embedding, norms, max(embedding, *tensors))


def count_factors(model: ModelConfig, adapter: AdapterSpec) -> int:
    """Elements of A and B that a token is multiplied with in one layer. VeRA computes A x once for the modules with the
    same input, unless dropout gives every module an input of its own.
    """
    targets = adapter.target_modules
    outs = sum(model.module_shape(module)[0] for module in targets)
    widths = {module: model.module_shape(module)[1] for module in targets}
    if isinstance(adapter, VeraSpec) and not adapter.dropout:
        first = (next((m for m in modules if m in widths), None) for modules in MODULES_BY_INPUT)
        widths = {module: widths[module] for module in first if module is not None}
    return adapter.rank * (outs + sum(widths.values()))


def count_dora_norms(model: ModelConfig, adapter: AdapterSpec) -> int:
    """Products that a forward pass takes for DoRA's norms, whatever its tokens: A and B of a unit matrix, as PEFT
    computes B A in every module; 0 for the other methods.
    """
    if not isinstance(adapter, DoraSpec):
        return 0
    shapes = [model.module_shape(module) for module in adapter.target_modules]
    return model.num_layers * sum(width * adapter.rank * (out + width) for out, width in shapes)


def count_vera_pair(model: ModelConfig, adapter: AdapterSpec) -> int:
    """Elements of VeRA's frozen pair (A, B), which all modules share; 0 for the other methods."""
    if not isinstance(adapter, VeraSpec):
        return 0
    shapes = [model.module_shape(module) for module in adapter.target_modules]
    return adapter.rank * (max(out for out, _ in shapes) + max(width for _, width in shapes))
