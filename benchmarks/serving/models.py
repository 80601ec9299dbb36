"""Base models to measure: one on this machine, or random weights of a known shape, made where they are used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loray.bases.checkpoint import canonical_config, expected_shapes
from loray.bases.config import ModelConfig
from loray.bases.presets import preset
from loray.bases.registry import BaseModel, add_base, get_base
from loray.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LLAMA3 = preset("Meta-Llama-3-8B")
assert _LLAMA3 is not None
RANDOM: Mapping[str, ModelConfig] = {
    "llama3-8b-random": _LLAMA3,
    "tiny-random": replace(
        _LLAMA3,
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        layers=_LLAMA3.layers[:2],
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
    ),
}


def bench_base(name: str = "smollm2", folder: Path | None = None) -> BaseModel:
    """A base by name. Of a random base only `config.json` is written, to `folder`; "smollm2" is added if missing."""
    if name in RANDOM:
        assert folder is not None
        config, path = RANDOM[name], folder / "bases" / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(llama_json(config), indent=2) + "\n", encoding="utf-8")
        fingerprint = hashlib.sha256(f"{name} {canonical_config(config)}".encode()).hexdigest()
        return BaseModel(name, path, fingerprint, config, source="random")
    home = Settings.from_env().home
    return add_base(name, home=home) if name == "smollm2" else get_base(home, name)


def llama_json(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of an untied Llama in bf16, for peers that read the folder."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": config.hf_rope(),
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }


def random_tensors(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a checkpoint that exists only in memory: norms of 1, weights of standard deviation 0.02."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    for name, shape in expected_shapes(config).items():
        weight = torch.empty(shape, device=device, dtype=dtype)
        if name.endswith("norm.weight"):
            yield name, weight.fill_(1.0)
        else:
            yield name, weight.normal_(0.0, 0.02, generator=generator)
