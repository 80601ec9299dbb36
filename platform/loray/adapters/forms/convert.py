"""A VeRA adapter as a LoRA adapter: Λb B Λd A is the product of two matrices of VeRA's rank.

For tools that know LoRA alone, or to continue training as LoRA. The result computes the same, and is as large as a LoRA
adapter of that rank.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from loray.adapters.peft_format import PREFIX, write_folder
from loray.adapters.weights import AdapterWeights, LoraWeights, ProjectionPair, VeraWeights
from loray.bases.config import ModelConfig
from loray.errors import UnsupportedError
from loray.spec import LINEAR_MODULES


def vera_to_lora(weights: AdapterWeights, base: ModelConfig) -> AdapterWeights:
    """B' = Λb B[:O] and A' = Λd A[:, :I], in fp32, with scale 1. Raises UnsupportedError for other adapters."""
    if weights.pair is None:
        raise UnsupportedError("the adapter is not VeRA; only VeRA adapters are converted to LoRA")
    modules = {
        key: as_lora(module, weights.pair, base.module_shape(key.module)[1]) for key, module in weights.modules.items()
    }
    return replace(weights, modules=modules, pair=None)


def as_lora(module: LoraWeights | VeraWeights, pair: ProjectionPair | None, width: int) -> LoraWeights:
    """A module with an input of `width` elements as LoRA. A LoRA module is returned unchanged."""
    if isinstance(module, LoraWeights):
        return module
    assert pair is not None
    inner_RI = module.d_R.float()[:, None] * pair.a_RI[:, :width].float()
    outer_OR = module.b_O.float()[:, None] * pair.b_OR[: module.b_O.shape[0]].float()
    return LoraWeights(inner_RI, outer_OR, scale=1.0)


def save_lora(weights: AdapterWeights, folder: Path, *, base_name: str) -> None:
    """Write a LoRA adapter of one rank and scale 1 in PEFT's format, with norms and embedding as `modules_to_save`."""
    prefix = f"{PREFIX}model."
    tensors: dict[str, Tensor] = {}
    ranks = set()
    for key, module in weights.modules.items():
        assert isinstance(module, LoraWeights)
        assert module.scale == 1.0
        ranks.add(module.a_RI.shape[0])
        tensors[f"{prefix}{key.path}.lora_A.weight"] = module.a_RI
        tensors[f"{prefix}{key.path}.lora_B.weight"] = module.b_OR
    (rank,) = ranks
    whole = {path.rpartition(".")[2] for path in weights.norms}
    tensors |= {f"{prefix}{path}.weight": norm for path, norm in weights.norms.items()}
    if weights.embedding is not None:
        assert weights.embedding.token_ids is None, "PEFT's VeRA stores embeddings whole"
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
        "target_modules": [m for m in LINEAR_MODULES if any(key.module == m for key in weights.modules)],
        "modules_to_save": sorted(whole) or None,
        "inference_mode": True,
    }
    write_folder(folder, config, tensors)
