"""Putting an untrained adapter into a transformers model: LoRA by PEFT, VeRA by ours, LongLoRA's two extras."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, VeraConfig, inject_adapter_in_model
from torch import nn

from loray.adapters.vera import VeraLinear, inject_vera
from loray.errors import UnsupportedError
from loray.spec import AdapterSpec, LongContext, LoraSpec, VeraSpec

ADAPTER = "default"  # PEFT's name of an adapter inside a model
BASE_ROWS = "base_weight"  # buffer of an untied trained embedding: the base's rows, to see which ones training moved


def attach(model: Any, spec: AdapterSpec, *, seed: int) -> None:
    """Change `model` in place so that exactly the adapter's parameters are trained. It still computes what it did.

    The same seed gives the same initial weights; torch's own generator is left as it was. Trained parameters have the
    dtype of the base: an optimizer must hold fp32 copies of them.

    `spec.long_context` adds norms (all RMSNorms) and the input embedding. Where input and output embeddings are tied,
    the trained embedding is a copy and the output head stays the base's.

    Raises ValueError where `model` has an adapter already, UnsupportedError where it lacks a target module.
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
            inject_adapter_in_model(lora_config(spec), model, adapter_name=ADAPTER)
    if spec.long_context is not None:
        _train_extras(model, spec.long_context)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def peft_config(spec: AdapterSpec, **options: Any) -> PeftConfig:
    """What PEFT would be told to make the same adapter."""
    return _vera_config(spec, **options) if isinstance(spec, VeraSpec) else lora_config(spec, **options)


def lora_config(spec: LoraSpec, **options: Any) -> LoraConfig:
    return LoraConfig(
        r=spec.rank,
        lora_alpha=int(spec.alpha) if spec.alpha == int(spec.alpha) else spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=list(spec.target_modules),
        use_rslora=spec.use_rslora,
        task_type="CAUSAL_LM",
        **options,
    )


def _vera_config(spec: VeraSpec, **options: Any) -> VeraConfig:
    with warnings.catch_warnings():
        # That the pair is drawn again is what PEFT warns of; the manifest pins its digest.
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


def _train_extras(model: Any, long_context: LongContext) -> None:
    """Without PEFT's wrappers: they would keep a second copy of every norm, and VeRA needs the same."""
    if long_context.train_norms:
        for module in model.modules():
            if type(module).__name__.endswith("RMSNorm"):
                module.weight.requires_grad_(True)
    if long_context.train_embeddings:
        embedding = model.get_input_embeddings()
        head = model.get_output_embeddings()
        if head is not None and head.weight is embedding.weight:
            embedding = copy.deepcopy(embedding)
            model.set_input_embeddings(embedding)
        else:
            embedding.register_buffer(BASE_ROWS, embedding.weight.detach().clone(), persistent=False)
        embedding.weight.requires_grad_(True)


def trained_norms(model: nn.Module) -> list[str]:
    """Last names of the trained norms, as PEFT's `modules_to_save` takes them: "input_layernorm", "norm", …"""
    paths = (path for path, p in model.named_parameters() if p.requires_grad and path.endswith("norm.weight"))
    return sorted({path.split(".")[-2] for path in paths})
