"""Base models to measure: one of this machine, or random weights of a known shape that are made where they are used."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loray.bases.checkpoint import canonical_config, expected_shapes
from loray.bases.config import ModelConfig
from loray.bases.registry import BaseModel, add_base, get_base
from loray.settings import Settings

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_LLAMA3: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
RANDOM: Mapping[str, Mapping[str, Any]] = {
    "llama3-8b-random": {
        **_LLAMA3,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "tiny-random": {
        **_LLAMA3,
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
    },
}


def bench_base(name: str = "smollm2", folder: Path | None = None) -> BaseModel:
    """A base by name. A random one is its `config.json` in `folder` alone; "smollm2" is made at first use."""
    if name in RANDOM:
        assert folder is not None
        path = folder / "bases" / name
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.json").write_text(json.dumps(RANDOM[name], indent=2) + "\n", encoding="utf-8")
        config = ModelConfig.from_folder(path)
        fingerprint = hashlib.sha256(f"{name} {canonical_config(config)}".encode()).hexdigest()
        return BaseModel(name, path, fingerprint, config, source="random")
    home = Settings.from_env().home
    return add_base(name, home=home) if name == "smollm2" else get_base(home, name)


def random_tensors(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors that are on no disk: norms of 1, weights of standard deviation 0.02."""
    import torch

    generator = torch.Generator(device).manual_seed(0)
    for name, shape in expected_shapes(config).items():
        weight = torch.empty(shape, device=device, dtype=dtype)
        if name.endswith("norm.weight"):
            yield name, weight.fill_(1.0)
        else:
            yield name, weight.normal_(0.0, 0.02, generator=generator)


class NoTokenizer:
    """Of a random base: any id is one space."""

    def decode(self, ids: list[int], **options: Any) -> str:
        return " " * len(ids)
