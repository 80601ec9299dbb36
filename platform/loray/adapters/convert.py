"""An adapter in other forms: as LoRA, merged into its base, and as GGUF."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loray.adapters.peft_format import MODULES, PREFIX, write_folder
from loray.bases.checkpoint import plain_name, stored_dtype
from loray.bases.config import ARCHITECTURES, ModelConfig
from loray.bases.gguf import LAYER_NAMES, PERMUTED, permuted
from loray.bases.quantized import rounded
from loray.bases.registry import BaseModel, copy_beside_weights
from loray.bases.weights import WeightSource, write_tensors
from loray.errors import ConflictError, UnsupportedError
from loray.methods.expert_lora import EXPERTS, ExpertLoraWeights
from loray.methods.weights import AdapterWeights, LoraWeights, ModuleKey, ModuleWeights
from loray.spec import QuantizationSpec

# -- LoRA -------------------------------------------------------------------------------------------------------------


def to_lora(weights: AdapterWeights, base: ModelConfig) -> AdapterWeights:
    """Convert VeRA or MiSS to LoRA, for tools that know LoRA alone, or to continue training as LoRA.

    The result computes the same, and is as large as a LoRA adapter of that rank. Raises UnsupportedError for other
    adapters.
    """
    modules = _as_lora(weights, base)
    if all(modules[key] is module for key, module in weights.modules.items()):
        raise UnsupportedError(f"the adapter's method is {weights.method}, which is stored as LoRA already")
    return replace(weights, modules=modules, pair=None)


def _as_lora(weights: AdapterWeights, base: ModelConfig) -> dict[ModuleKey, LoraWeights]:
    return {
        key: module.as_lora(weights.pair, base.module_shape(key.module)[1]) for key, module in weights.modules.items()
    }


def save_lora(weights: AdapterWeights, folder: Path, *, base_name: str) -> None:
    """Write a LoRA adapter of one rank and scale 1 in PEFT's format, with norms and embedding as `modules_to_save`."""
    prefix = f"{PREFIX}model."
    tensors: dict[str, Tensor] = {}
    ranks = set()
    for key, module in weights.modules.items():
        assert module.as_lora(None, 0).scale == 1.0
        ranks.add(module.rank)
        tensors |= {f"{prefix}{key.path}.{part}": tensor for part, tensor in module.parts.items()}
    (rank,) = ranks
    whole = {path.rpartition(".")[2] for path in weights.norms}
    tensors |= {f"{prefix}{path}.weight": norm for path, norm in weights.norms.items()}
    if weights.embedding is not None:
        assert weights.embedding.token_ids is None, "PEFT stores them whole beside all but LoRA"
        whole.add("embed_tokens")
        tensors[f"{prefix}embed_tokens.weight"] = weights.embedding.rows_VD
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [m for m in MODULES if any(key.module == m for key in weights.modules)],
        "modules_to_save": sorted(whole) or None,
        "inference_mode": True,
    }
    write_folder(folder, config, tensors)


# -- merged -----------------------------------------------------------------------------------------------------------

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LINEAR = tuple(f".{module}.weight" for module in MODULES)
# The last ones are older checkpoints'.
_ROPE_FIELDS = ("rope_parameters", "rope_scaling", "rope_theta", "rope_local_base_freq")


class RoundedBase(NamedTuple):
    """The quantization of a base, and the dtype in which it computed."""

    quantization: QuantizationSpec
    dtype: torch.dtype


def merge_adapter(
    base: BaseModel,
    weights: AdapterWeights,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    trained_on: RoundedBase | None = None,
) -> None:
    """Write base + adapter to `folder` with the base's tokenizer, in `dtype` or the base's.

    A quantised base is dequantised. With `trained_on` a 16-bit base's linear layers have the values that they had,
    quantized, while the adapter was trained; else they are the base's own, as where the adapter is served. Sums are
    computed in fp32 and rounded once. `weights.rope` and `context_length` replace the base's in `config.json`, and
    trained norms the base's. If the adapter has an input embedding and the base's output head is tied, the checkpoint
    has both the adapter's embedding and the base's head.

    Raises ConflictError where `folder` exists and is not empty, and UnsupportedError for aLoRA.
    """
    _check_active(weights)
    if folder.exists() and any(folder.iterdir()):
        raise ConflictError(f"{folder} is not empty; name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    copy_beside_weights(base.path, folder)
    write_tensors(_merged(base, weights, dtype, trained_on), folder)
    _write_config(base, weights, folder, dtype)


def _merged(
    base: BaseModel, weights: AdapterWeights, dtype: torch.dtype | None, trained_on: RoundedBase | None
) -> Iterator[tuple[str, Tensor]]:
    norms = {f"model.{path}.weight": norm for path, norm in weights.norms.items()}
    adapted: dict[str, ModuleWeights] = {}
    for key, module in weights.modules.items():
        if isinstance(module, ExpertLoraWeights):
            if module.by_turns:
                raise UnsupportedError(
                    f"LoRA of the experts of {base.config.architecture} is not merged: serve it as it is"
                )
            path = f"model.layers.{key.layer}.{EXPERTS}"
            adapted |= {f"{path}.{i}.{key.module}": module.expert(i) for i in range(module.num_experts)}
        else:
            adapted[f"model.{key.path}"] = module
    of_quantized: torch.dtype = getattr(torch, stored_dtype(base.path))
    for name, stored in WeightSource(base.path, base.config):
        if isinstance(stored, Tensor):
            tensor, kept = stored, dtype or stored.dtype
        else:
            tensor, kept = stored.dequantized(slice(None), torch.float32), dtype or of_quantized
        if name == _HEAD and base.config.tie_word_embeddings:
            continue  # some exporters write the tied copy
        if trained_on is not None and name.endswith(_LINEAR) and ".experts." not in name:
            tensor = rounded(tensor.to(trained_on.dtype), trained_on.quantization)
        path, _, kind = plain_name(name).rpartition(".")
        if path in adapted:
            module = adapted[path]
            merged = module.merged_bias(tensor) if kind == "bias" else module.merged(tensor, weights.pair)
            yield name, merged.to(kept)
        elif name == _EMBEDDING and weights.embedding is not None:
            rows_VD, ids = tensor.to(kept, copy=True), weights.embedding.token_ids
            rows_VD[slice(None) if ids is None else list(ids)] = weights.embedding.rows_VD.to(kept)
            yield name, rows_VD
            if base.config.tie_word_embeddings:
                yield _HEAD, tensor.to(kept, copy=True)
        else:
            yield name, norms.get(name, tensor).to(kept)


def _write_config(base: BaseModel, weights: AdapterWeights, folder: Path, dtype: torch.dtype | None) -> None:
    config = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    if weights.rope is not None:
        config = {field: value for field, value in config.items() if field not in _ROPE_FIELDS}
        config["rope_parameters"] = base.config.hf_rope(weights.rope)
        assert weights.context_length is not None
        config["max_position_embeddings"] = weights.context_length
    if weights.embedding is not None:
        config["tie_word_embeddings"] = False
    config.pop("quantization_config", None)
    if dtype is not None:
        config = {field: value for field, value in config.items() if field != "torch_dtype"}
        config["dtype"] = str(dtype).removeprefix("torch.")
    _write_json(folder / "config.json", config)


def _write_json(path: Path, data: Any) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# -- GGUF -------------------------------------------------------------------------------------------------------------

_MODULES = {name.rpartition(".")[2]: called for called, name in LAYER_NAMES.items()}


def write_gguf(weights: AdapterWeights, base: ModelConfig, path: Path) -> None:
    """Write the adapter in fp32 to the new file `path`. VeRA and MiSS become LoRA of their rank.

    llama.cpp adds alpha / rank · B A x to a linear module. Where modules have several ranks or scales, B has the scale
    in it and alpha is 0, which llama.cpp takes as a scale of 1. Raises UnsupportedError for an adapter that changes
    more than linear modules.
    """
    import numpy as np
    from gguf import GGUFType, GGUFWriter, Keys

    _check_active(weights)
    _check_linear(weights)
    if base.has_fused_modules:
        raise UnsupportedError(
            f"GGUF-LoRA of {base.architecture} is not written: take the adapter merged, or in PEFT's form"
        )
    architecture = ARCHITECTURES[base.architecture].gguf
    modules = _as_lora(weights, base)
    alphas = {(module.a_RI.shape[0], module.scale) for module in modules.values()}
    is_one = len(alphas) == 1
    alpha = next(rank * scale for rank, scale in alphas) if is_one else 0.0
    writer = GGUFWriter(path, architecture)
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string(Keys.Adapter.TYPE, "lora")
    writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
    for key, module in sorted(modules.items()):
        b_OR = module.b_OR.float() if is_one else module.scale * module.b_OR.float()
        if key.module in PERMUTED.get(architecture, ()):
            b_OR = permuted(b_OR, base.head_dim)
        name = f"blk.{key.layer}.{_MODULES[key.module]}.weight"
        for part, tensor in (("lora_a", module.a_RI.float()), ("lora_b", b_OR)):
            writer.add_tensor(f"{name}.{part}", np.ascontiguousarray(tensor.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _check_active(weights: AdapterWeights) -> None:
    if weights.invocation_tokens is not None:
        raise UnsupportedError(
            "the adapter is active from its invocation on alone (aLoRA), which a merged checkpoint or GGUF cannot say: "
            "serve it here, with PEFT or with vLLM"
        )


def _check_linear(weights: AdapterWeights) -> None:
    more = {
        "norms": bool(weights.norms),
        "the input embedding": weights.embedding is not None,
        "RoPE": weights.rope is not None,
        "the magnitudes of outputs (DoRA)": weights.method == "dora",
    }
    changed = [what for what, is_changed in more.items() if is_changed]
    if changed:
        raise UnsupportedError(
            f"GGUF-LoRA holds linear modules alone, and this adapter also changes {', '.join(changed)}: take it merged"
        )
