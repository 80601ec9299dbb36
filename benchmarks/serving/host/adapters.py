"""Adapters of each method for the host's benchmark. Kernels that do nothing read no weights, so all are zeros."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice

import torch

from loray.bases.config import ModelConfig
from loray.methods.weights import AdapterWeights, EmbeddingRows, LoraWeights, ModuleKey, SharedProjection, VeraWeights
from loray.spec import ATTENTION_MODULES, RopeParameters

METHODS = ("lora", "vera", "longlora")
VERA_RANK = 256
_EMBEDDING_ROWS = 64


def make_adapters(config: ModelConfig, rank: int, methods: tuple[str, ...], num: int) -> list[AdapterWeights]:
    """`num` adapters on q, k, v and o, of the methods by turns. Those of VeRA share a pair."""
    kinds = {method: _adapter(config, rank, method) for method in methods}
    return list(islice(cycle(kinds.values()), num))


def weights_bytes(weights: AdapterWeights) -> int:
    """In bf16, without VeRA's pair."""
    tensors = [t for m in weights.modules.values() for t in _tensors(m)] + [*weights.norms.values()]
    if weights.embedding is not None:
        tensors.append(weights.embedding.rows_VD)
    return sum(2 * t.numel() for t in tensors)


def _tensors(module: LoraWeights | VeraWeights) -> Iterator[torch.Tensor]:
    yield from (module.a_RI, module.b_OR) if isinstance(module, LoraWeights) else (module.d_R, module.b_O)


def _adapter(config: ModelConfig, rank: int, method: str) -> AdapterWeights:
    shapes = {module: config.module_shape(module) for module in ATTENTION_MODULES}
    layers = range(config.num_layers)
    if method == "vera":
        widest = max(max(shape) for shape in shapes.values())
        pair = SharedProjection(torch.zeros(VERA_RANK, widest), torch.zeros(widest, VERA_RANK), "pair")
        vera = {m: VeraWeights(torch.zeros(VERA_RANK), torch.zeros(out)) for m, (out, _) in shapes.items()}
        return AdapterWeights({ModuleKey(layer, m): own for m, own in vera.items() for layer in layers}, pair)
    lora = {m: LoraWeights(torch.zeros(rank, width), torch.zeros(out, rank), 1.0) for m, (out, width) in shapes.items()}
    modules = {ModuleKey(layer, m): own for m, own in lora.items() for layer in layers}
    if method == "lora":
        return AdapterWeights(modules)
    hidden, names = config.hidden_size, ("input_layernorm", "post_attention_layernorm")
    norms = {f"layers.{layer}.{name}": torch.ones(hidden) for layer in layers for name in names}
    return AdapterWeights(
        modules,
        norms=norms | {"norm": torch.ones(hidden)},
        embedding=EmbeddingRows(tuple(range(_EMBEDDING_ROWS)), torch.zeros(_EMBEDDING_ROWS, hidden)),
        rope=RopeParameters(rope_type="linear", rope_theta=10000.0, factor=2.0),
    )
