"""Shapes of well-known base models, for plans and advice about a base that this machine does not have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from loray.bases import smollm2
from loray.bases.config import ModelConfig
from loray.bases.registry import get_base
from loray.errors import BaseNotFound

_LLAMA_2: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
}
# Named as `loray base add OWNER/NAME` names them; values from the published config.json files.
_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "Llama-2-7b-hf": _LLAMA_2
    | {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "Llama-2-13b-hf": _LLAMA_2
    | {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "Llama-2-70b-hf": _LLAMA_2
    | {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
    },
    "Meta-Llama-3-8B": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    },
    "Mixtral-8x7B-v0.1": {
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
    },
    "Qwen3-30B-A3B": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_hidden_layers": 48,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
    },
    "gpt-oss-20b": {
        "architectures": ["GptOssForCausalLM"],
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "num_hidden_layers": 24,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "num_local_experts": 32,
        "num_experts_per_tok": 4,
        "sliding_window": 128,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 131072,
        "rope_theta": 150000.0,
        "rope_scaling": {
            "rope_type": "yarn",
            "factor": 32.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "original_max_position_embeddings": 4096,
            "truncate": False,
        },
    },
    smollm2.NAME: smollm2.CONFIG,
}


def preset_names() -> list[str]:
    return sorted(_PRESETS)


def preset(name: str) -> ModelConfig | None:
    """Look up the configuration of a well-known base; None where it is none."""
    return ModelConfig.from_hf(_PRESETS[name]) if name in _PRESETS else None


def known_shape(base: str, home: Path) -> ModelConfig:
    """Find the shape of a base on this machine, else of the well-known base by that name. Raises BaseNotFound."""
    try:
        return get_base(home, base).config
    except BaseNotFound as e:
        if (known := preset(base)) is not None:
            return known
        raise BaseNotFound(
            f"no base model {base!r} on this machine, and its shape is not among those known "
            f"({', '.join(preset_names())}): give its configuration with --config, or add it with `loray base add`"
        ) from e


def shapes_in(home: Path) -> Callable[[str], ModelConfig | None]:
    """Make `known_shape` of this machine a function of the name alone; None where a base's shape is not known."""

    def shape(base: str) -> ModelConfig | None:
        try:
            return known_shape(base, home)
        except BaseNotFound:
            return None

    return shape
