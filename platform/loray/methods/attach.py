"""Puts an adapter into a transformers model, loads weights into it, and turns it off."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftConfig, VeraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from loray.errors import UnsupportedError
from loray.methods.vera_module import VeraLinear, inject_vera
from loray.methods.weights import AdapterWeights, LoraWeights
from loray.spec import AdapterSpec, DoraSpec, LoraSpec, VeraSpec

ADAPTER = "default"  # PEFT's name of the adapter inside a model
BASE_ROWS = "base_weight"  # buffer of an untied trained embedding with the base's rows, to find those that changed


class InitialAdapter(NamedTuple):
    """`digest` is that of the published adapter, `folder` holds its files."""

    digest: str
    folder: Path


def attach(model: Any, spec: AdapterSpec, *, seed: int) -> None:
    """Change `model` in place so that exactly the adapter's parameters are trained. Its outputs do not change yet.

    The same seed gives the same initial weights, but for last bits with another instruction set; the state of torch's
    default generator does not change. Trained parameters have the base's dtype: an optimizer must hold fp32 copies of
    them. DoRA's magnitudes alone are fp32: they are the norms of the base's rows, of which training changes a small
    part.

    With `spec.train_norms` all RMSNorms are trained as well, with `spec.train_embeddings` the input embedding. Where
    input and output embeddings are tied, the trained embedding is a copy, and the output head stays the base's.

    Raises ValueError where `model` has an adapter already, and UnsupportedError where it lacks a target module.
    """
    if hasattr(model, "peft_config") or any(isinstance(m, VeraLinear) for m in model.modules()):
        raise ValueError("this model has an adapter already; load the base again for another one")
    names = {path.rpartition(".")[2] for path, _ in model.named_modules()}
    if missing := [m for m in spec.target_modules if m not in names]:
        raise UnsupportedError(f"the model has no modules {', '.join(missing)}; take them out of target_modules")
    dtype = model.get_input_embeddings().weight.dtype
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        if isinstance(spec, VeraSpec):
            inject_vera(model, spec)
        else:
            inject_adapter_in_model(_lora_config(spec), model, adapter_name=ADAPTER)
    _train_extras(model, spec)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32 if is_magnitude(name) else dtype)


def is_magnitude(name: str) -> bool:
    """True where a parameter of this name is a vector of DoRA's magnitudes."""
    return ".lora_magnitude_vector." in name


@torch.no_grad()
def load_weights(model: Any, weights: AdapterWeights) -> None:
    """Copy `weights` into `model`, to which `attach` has added an adapter of the same modules and ranks.

    Norms and an embedding that `weights` lack stay the base's.
    """
    inner = model.base_model
    for key, module in weights.modules.items():
        layer = inner.get_submodule(key.path)
        if isinstance(module, LoraWeights):
            layer.lora_A[ADAPTER].weight.copy_(module.a_RI)
            layer.lora_B[ADAPTER].weight.copy_(module.b_OR)
            if module.magnitude_O is not None:
                layer.lora_magnitude_vector[ADAPTER].weight.copy_(module.magnitude_O)
        else:
            layer.vera_lambda_d.copy_(module.d_R)
            layer.vera_lambda_b.copy_(module.b_O)
    for path, norm in weights.norms.items():
        inner.get_submodule(path).weight.copy_(norm)
    if weights.embedding is not None:
        weight_VD, token_ids = model.get_input_embeddings().weight, weights.embedding.token_ids
        weight_VD[slice(None) if token_ids is None else list(token_ids)] = weights.embedding.rows_VD.to(weight_VD)


class AdapterSwitch:
    """Turns the adapter that `attach` has put into a model off and on; trained norms and embeddings stay on."""

    def __init__(self, model: nn.Module) -> None:
        self._lora: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self._vera = [module for module in model.modules() if isinstance(module, VeraLinear)]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let the model compute as its base does inside the block. No parameter changes."""
        self._set(is_off=True)
        try:
            yield
        finally:
            self._set(is_off=False)

    def _set(self, *, is_off: bool) -> None:
        for lora in self._lora:
            lora._disable_adapters = is_off  # PEFT's own method also freezes parameters, which sharding would keep
        for vera in self._vera:
            vera.is_off = is_off


def peft_config(spec: AdapterSpec, **options: Any) -> PeftConfig:
    """Make the configuration with which PEFT makes the same adapter."""
    return _vera_config(spec, **options) if isinstance(spec, VeraSpec) else _lora_config(spec, **options)


def _lora_config(spec: LoraSpec, **options: Any) -> LoraConfig:
    return LoraConfig(
        r=spec.rank,
        lora_alpha=int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=list(spec.target_modules),
        use_rslora=spec.use_rslora,
        use_dora=isinstance(spec, DoraSpec),
        task_type="CAUSAL_LM",
        **options,
    )


def _vera_config(spec: VeraSpec, **options: Any) -> VeraConfig:
    with warnings.catch_warnings():
        # PEFT warns that the pair is drawn again when the adapter is loaded; the manifest pins its digest.
        warnings.filterwarnings("ignore", message="Specified to not save vera_A and vera_B")
        return VeraConfig(
            r=spec.rank,
            target_modules=list(spec.target_modules),
            projection_prng_key=spec.projection_prng_key,
            save_projection=spec.save_projection,
            vera_dropout=spec.dropout,
            d_initial=spec.d_initial,
            task_type="CAUSAL_LM",
            **options,
        )


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
