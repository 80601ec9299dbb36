"""Puts an adapter into a transformers model, and loads weights into it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loray.errors import UnsupportedError
from loray.methods import keeps_fp32, method_of
from loray.methods.base import ADAPTER, stored_modules
from loray.methods.expert_lora import ExpertLoraWeights, has_experts
from loray.methods.weights import AdapterWeights
from loray.spec import MLP_MODULES, AdapterSpec

BASE_ROWS = "base_weight"  # buffer of an untied trained embedding with the base's rows, to find those that changed


class InitialAdapter(NamedTuple):
    """`digest` is that of the published adapter, `folder` holds its files."""

    digest: str
    folder: Path


def attach(model: Any, spec: AdapterSpec, *, seed: int) -> None:
    """Change `model` in place so that exactly the adapter's parameters are trained. Its outputs do not change yet.

    The same seed gives the same initial weights, but for last bits with another instruction set; the state of torch's
    default generator does not change. Trained parameters have the base's dtype: an optimizer must hold fp32 copies of
    them. What multiplies outputs alone is fp32: training changes a small part of it.

    With `spec.train_norms` all RMSNorms are trained as well, with `spec.train_embeddings` the input embedding. Where
    input and output embeddings are tied, the trained embedding is a copy, and the output head stays the base's.

    Raises ValueError where `model` has an adapter already, and UnsupportedError where it lacks a target module.
    """
    if hasattr(model, "peft_config") or any(hasattr(m, "base_layer") for m in model.modules()):
        raise ValueError("this model has an adapter already; load the base again for another one")
    spec = on_model(model, spec)
    dtype = model.get_input_embeddings().weight.dtype
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        method_of(spec).inject(model, spec)
    _train_extras(model, spec)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32 if keeps_fp32(name) else dtype)


def on_model(model: Any, spec: AdapterSpec) -> AdapterSpec:
    """Give `spec` with its target modules as `model` has them. Raises UnsupportedError where it lacks one."""
    names = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    if method_of(spec).adapts_experts and has_experts(model):
        names |= {*MLP_MODULES}
    modules = stored_modules(spec.target_modules, names)
    if missing := [m for m in modules if m not in names]:
        raise UnsupportedError(f"the model has no modules {', '.join(missing)}; take them out of target_modules")
    return spec.model_copy(update={"target_modules": modules})


def peft_name(name: str) -> str:
    """Name a parameter as PEFT's files do: without the adapter's name."""
    return name.replace(f".{ADAPTER}.", ".").removesuffix(f".{ADAPTER}")


def initial_values(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers, by name, from which a module's training began, and which a resumed run takes over: computed on
    another machine they may differ.
    """
    return ((name, buffer) for name, buffer in model.named_buffers() if ".initial_" in name)


@torch.no_grad()
def load_weights(model: Any, weights: AdapterWeights) -> None:
    """Copy `weights` into `model`, to which `attach` has added an adapter of the same modules and ranks.

    Norms and an embedding that `weights` lack stay the base's.
    """
    inner = model.base_model
    parameters = {peft_name(name): parameter for name, parameter in inner.named_parameters()}
    for key, module in weights.modules.items():
        if isinstance(module, ExpertLoraWeights):
            for name, tensor in module.parts.items():
                parameters[f"layers.{key.layer}.{name}"].copy_(tensor)
            continue
        owner: Any = inner.get_submodule(key.path)
        own = owner.own_parts(module.parts) if hasattr(owner, "own_parts") else module.parts
        for part, tensor in own.items():
            parameters[f"{key.path}.{part}"].copy_(tensor)
    for path, norm in weights.norms.items():
        inner.get_submodule(path).weight.copy_(norm)
    if weights.embedding is not None:
        weight_VD, token_ids = model.get_input_embeddings().weight, weights.embedding.token_ids
        weight_VD[slice(None) if token_ids is None else list(token_ids)] = weights.embedding.rows_VD.to(weight_VD)


def _train_extras(model: Any, spec: AdapterSpec) -> None:
    """Train norms and embedding, without PEFT's wrappers: these keep a second copy of every norm, and do not work with
    VeRA.
    """
    if spec.train_norms:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.weight.requires_grad_(True)
    if spec.train_embeddings:
        embedding = model.get_input_embeddings()
        head = model.get_output_embeddings()
        if head is not None and head.weight is embedding.weight:
            embedding = copy.deepcopy(embedding)
            model.set_input_embeddings(embedding)
        else:
            embedding.register_buffer(BASE_ROWS, embedding.weight.detach().clone(), persistent=False)
        embedding.weight.requires_grad_(True)


def trained_norms(model: nn.Module) -> list[str]:
    """List the last parts of the trained norms' paths, for PEFT's `modules_to_save`: "input_layernorm", "norm", …"""
    paths = (path for path, p in model.named_parameters() if p.requires_grad and path.endswith("norm.weight"))
    return sorted({path.split(".")[-2] for path in paths})
