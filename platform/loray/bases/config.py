"""`ModelConfig`, the configuration of a Llama-shaped base, and how its RoPE is scaled.

An architecture that the decoder does not cover is refused by name.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from loray.errors import UnsupportedError
from loray.spec import LINEAR_MODULES, RopeParameters, RopeScaling, RopeType

# transformers' architecture → (QKV biases, RMSNorm on each query and key head)
ARCHITECTURES: Mapping[str, tuple[bool, bool]] = {
    "LlamaForCausalLM": (False, False),
    "MistralForCausalLM": (False, False),
    "Qwen2ForCausalLM": (True, False),
    "Qwen3ForCausalLM": (False, True),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A Llama-shaped decoder. Widths in elements, lengths in tokens."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeParameters
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    qk_norm: bool
    eos_token_ids: tuple[int, ...]

    def module_shape(self, module: str) -> tuple[int, int]:
        """(out, in) of a linear module by its last name, for example `q_proj`."""
        q, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        h, m = self.hidden_size, self.intermediate_size
        shapes = {
            "q_proj": (q, h),
            "k_proj": (kv, h),
            "v_proj": (kv, h),
            "o_proj": (h, q),
            "gate_proj": (m, h),
            "up_proj": (m, h),
            "down_proj": (h, m),
        }
        return shapes[module]

    @property
    def num_matrix_elements(self) -> int:
        """The elements of all matrices that a token is multiplied with: linear modules and the output head."""
        layer = sum(out * width for out, width in map(self.module_shape, LINEAR_MODULES))
        return self.num_layers * layer + self.vocab_size * self.hidden_size

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read a checkpoint's `config.json`. Raises UnsupportedError."""
        path = folder / "config.json"
        if not path.is_file():
            raise UnsupportedError(f"{folder} has no config.json: it is not a Hugging Face checkpoint")
        return cls.from_hf(json.loads(path.read_text(encoding="utf-8")))

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """Read the dictionary of a `config.json`. Raises UnsupportedError for what the decoder does not compute."""
        architecture = (hf.get("architectures") or ["(none)"])[0]
        if architecture not in ARCHITECTURES:
            raise UnsupportedError(
                f"architecture {architecture} is not supported; loray covers {', '.join(sorted(ARCHITECTURES))}"
            )
        qkv_bias, qk_norm = ARCHITECTURES[architecture]
        if architecture == "LlamaForCausalLM" and (hf.get("attention_bias") or hf.get("mlp_bias")):
            raise UnsupportedError("Llama checkpoints with attention_bias or mlp_bias are not supported")
        if architecture == "Qwen3ForCausalLM" and hf.get("attention_bias"):
            raise UnsupportedError("Qwen3 checkpoints with attention_bias are not supported")
        if hf.get("hidden_act", "silu") != "silu":
            raise UnsupportedError(f"hidden_act {hf['hidden_act']!r} is not supported; only silu is")
        window = hf.get("sliding_window")
        windowed = hf.get("use_sliding_window", architecture == "MistralForCausalLM")
        if window and windowed and window < hf["max_position_embeddings"]:
            raise UnsupportedError(f"sliding-window attention (window {window}) is not supported")
        eos = hf.get("eos_token_id")
        return cls(
            architecture=architecture,
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_layers=hf["num_hidden_layers"],
            num_heads=hf["num_attention_heads"],
            num_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            rms_norm_eps=hf["rms_norm_eps"],
            rope=_rope(hf),
            max_position_embeddings=hf["max_position_embeddings"],
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
        )


def _rope(hf: Mapping[str, Any]) -> RopeParameters:
    """transformers 5 writes `rope_parameters`; older checkpoints `rope_theta` and `rope_scaling`."""
    raw: dict[str, Any] = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    if "type" in raw:
        raw.setdefault("rope_type", raw.pop("type"))
    raw.setdefault("rope_theta", hf.get("rope_theta", 10000.0))
    if raw.get("rope_type", "default") == "yarn":
        raw.setdefault("original_max_position_embeddings", hf["max_position_embeddings"])
    known = RopeParameters.model_fields
    unknown = sorted(k for k, v in raw.items() if k not in known and v is not None)
    rope_type = raw.get("rope_type", "default")
    if unknown or rope_type not in get_args(RopeType):
        raise UnsupportedError(f"RoPE {rope_type!r}{f' with {unknown}' if unknown else ''} is not supported")
    return RopeParameters(**{k: v for k, v in raw.items() if v is not None})


def scaled(base: RopeParameters, scaling: RopeScaling, *, original_context: int, head_dim: int) -> RopeParameters:
    """Scale the RoPE of `base` by `scaling` from `original_context` tokens.

    linear  positions ÷ factor (Chen et al., 2023)
    ntk     theta · factor^(d/(d−2)), frequencies stretched unevenly ("NTK-aware", static)
    yarn    by frequency band, with attention temperature (Peng et al., 2023)
    A base that is scaled already is scaled further: factors of linear and of yarn multiply, each on a base of its own
    type, and ntk stretches theta under any type. Raises ValueError for other combinations, which are no RoPE that
    transformers computes.
    """
    match scaling.type, base.rope_type:
        case "linear", "default" | "linear":
            factor = scaling.factor * (base.factor or 1.0)
            return RopeParameters(rope_type="linear", rope_theta=base.rope_theta, factor=factor)
        case "ntk", _:
            return base.model_copy(
                update={"rope_theta": base.rope_theta * scaling.factor ** (head_dim / (head_dim - 2))}
            )
        case "yarn", "default":
            return RopeParameters(
                rope_type="yarn",
                rope_theta=base.rope_theta,
                factor=scaling.factor,
                original_max_position_embeddings=original_context,
            )
        case "yarn", "yarn":  # the temperature is that of the whole factor
            return base.model_copy(update={"factor": scaling.factor * (base.factor or 1.0), "attention_factor": None})
    raise ValueError(
        f"its RoPE is {base.rope_type!r} already, which {scaling.type} cannot scale further: take type: ntk, or leave "
        "rope_scaling out"
    )


def extended_context(rope: RopeParameters, base: RopeParameters, *, original_context: int, head_dim: int) -> int:
    """Invert `scaled`: how many tokens `rope` makes of `original_context` tokens of `base`, rounded up."""
    stretched: float = (rope.rope_theta / base.rope_theta) ** ((head_dim - 2) / head_dim)
    divided = (rope.factor or 1.0) / (base.factor or 1.0)
    return math.ceil(original_context * max(1.0, stretched) * max(1.0, divided))
