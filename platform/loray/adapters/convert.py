"""A VeRA adapter as a LoRA adapter: Λb B Λd A is a product of two matrices of VeRA's rank.

For tools that know LoRA alone, or to train on from there. It computes the same and is as large as a LoRA of that rank.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from loray.adapters.peft_format import CONFIG_FILE, WEIGHTS_FILE
from loray.adapters.weights import AdapterWeights, LoraWeights, ProjectionPair, VeraWeights
from loray.bases.config import ModelConfig
from loray.errors import UnsupportedError
from loray.spec import LINEAR_MODULES

_PREFIX = "base_model.model.model."


def vera_to_lora(weights: AdapterWeights, base: ModelConfig) -> AdapterWeights:
    """B' = Λb B[:O] and A' = Λd A[:, :I], in fp32 and with scale 1. UnsupportedError where it is no VeRA adapter."""
    if weights.pair is None:
        raise UnsupportedError("the adapter is not VeRA; only VeRA adapters are converted to LoRA")
    modules = {
        key: as_lora(module, weights.pair, base.module_shape(key.module)[1]) for key, module in weights.modules.items()
    }
    return replace(weights, modules=modules, pair=None)


def as_lora(module: LoraWeights | VeraWeights, pair: ProjectionPair | None, width: int) -> LoraWeights:
    """One module, `width` elements wide at its input; a LoRA module as it is."""
    if isinstance(module, LoraWeights):
        return module
    assert pair is not None
    inner_RI = module.d_R.float()[:, None] * pair.a_RI[:, :width].float()
    outer_OR = module.b_O.float()[:, None] * pair.b_OR[: module.b_O.shape[0]].float()
    return LoraWeights(inner_RI, outer_OR, scale=1.0)


def save_lora(weights: AdapterWeights, folder: Path, *, base_name: str) -> None:
    """Write a LoRA adapter of one rank, scale 1, in PEFT's format; norms and a dense embedding as `modules_to_save`."""
    tensors: dict[str, Tensor] = {}
    ranks = set()
    for key, module in weights.modules.items():
        assert isinstance(module, LoraWeights)
        assert module.scale == 1.0
        ranks.add(module.a_RI.shape[0])
        tensors[f"{_PREFIX}{key.path}.lora_A.weight"] = module.a_RI
        tensors[f"{_PREFIX}{key.path}.lora_B.weight"] = module.b_OR
    (rank,) = ranks
    whole = {path.rpartition(".")[2] for path in weights.norms}
    tensors |= {f"{_PREFIX}{path}.weight": norm for path, norm in weights.norms.items()}
    if weights.embedding is not None:
        assert weights.embedding.token_ids is None, "PEFT's VeRA stores embeddings whole"
        whole.add("embed_tokens")
        tensors[f"{_PREFIX}embed_tokens.weight"] = weights.embedding.rows_VD
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [m for m in LINEAR_MODULES if any(key.module == m for key in weights.modules)],
        "modules_to_save": sorted(whole) or None,
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    stored = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(stored, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
