"""A base that its strategy shards: built without weights, which are then read into the shards.

Frozen parameters are on torch's meta device, shapes without memory, until `replace_parameters` fills them, so that no
process holds the whole base. Adapters and what else is trained are whole on every rank, as in any model: the same seed
gives the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from loray.adapters.inject import BASE_ROWS
from loray.bases.checkpoint import CheckpointReader
from loray.bases.registry import BaseModel
from loray.spec import DType

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class BaseWeights:
    """Tensors of a base's checkpoint in `dtype`, by the names of a model's parameters, with an adapter or without."""

    def __init__(self, base: BaseModel, dtype: DType) -> None:
        self._reader = CheckpointReader(base.path)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._is_tied = base.config.tie_word_embeddings

    def has(self, name: str) -> bool:
        """Whether the parameter is the base's and not the adapter's."""
        return self._stored(name) in self._reader

    def read(self, name: str) -> Tensor:
        """The whole tensor; a view of the mapped file where it is stored in the dtype."""
        return self._reader.read(self._stored(name)).to(self._dtype)

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Its rows from `start` up to `stop`; nothing else is read."""
        return self._reader.read_rows(self._stored(name), start, stop).to(self._dtype)

    def _stored(self, name: str) -> str:
        stored = name.replace(".base_layer.", ".")  # PEFT's and VeRA's modules around the base's
        return _EMBEDDING if self._is_tied and stored == _HEAD else stored


def without_weights(config: Any, *, dtype: DType, attention: str) -> Any:
    """The causal language model of a transformers configuration. Parameters are on meta, buffers on the CPU."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype), attn_implementation=attention)
    for path, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # RoPE's frequencies
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
    replace_parameters(model, lambda _, p: torch.empty_like(p, device="meta") if _stands_for_more(p) else None)


def _stands_for_more(parameter: Tensor) -> bool:
    return parameter.untyped_storage().nbytes() < parameter.nbytes


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
