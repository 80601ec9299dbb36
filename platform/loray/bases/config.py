"""`ModelConfig`, the configuration of a Llama-shaped base, how its RoPE is scaled, and the families of bases.

A family is one entry of ARCHITECTURES: what its layers have beside a plain one's, and which checkpoints the decoder
does not cover. Nothing else asks for a family by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, get_args

from loray.bases.quantization import Quantization
from loray.errors import UnsupportedError
from loray.spec import LINEAR_MODULES, RopeParameters, RopeScaling, RopeType


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """This says how a decoder layer differs from a plain one.

    qkv_bias         q, k and v have a bias
    qk_norm          RMSNorm on each query and key head
    attention_scale  of scores; None: head_dim ** -0.5
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    attention_scale: float | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A Llama-shaped decoder. Widths in elements, lengths in tokens. `quantization`: of linear modules, if they are."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeParameters
    max_position_embeddings: int
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]
    layers: tuple[LayerSpec, ...]
    quantization: Quantization | None = None

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def attention_scale(self, layer: int) -> float:
        scale = self.layers[layer].attention_scale
        return float(self.head_dim**-0.5) if scale is None else scale

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

    def matrix_bytes(self, element_bytes: int, *, on_gpu: bool = False) -> int:
        """Count the bytes of `num_matrix_elements` in an engine whose dtype has `element_bytes`."""
        if self.quantization is None or not self.quantization.is_kept(on_gpu=on_gpu):
            return element_bytes * self.num_matrix_elements
        layer = sum(out * self.quantization.row_bytes(width) for out, width in map(self.module_shape, LINEAR_MODULES))
        return self.num_layers * layer + element_bytes * self.vocab_size * self.hidden_size

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """Read the dictionary of a `config.json`. Raises UnsupportedError for what the decoder does not compute."""
        name = (hf.get("architectures") or ["(none)"])[0]
        architecture = ARCHITECTURES.get(name)
        if architecture is None:
            raise UnsupportedError(
                f"architecture {name} is not supported; loray covers {', '.join(sorted(ARCHITECTURES))}"
            )
        if (why := architecture.refuses(hf)) is not None:
            raise UnsupportedError(why)
        eos = hf.get("eos_token_id")
        return cls(
            architecture=name,
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf["intermediate_size"],
            num_heads=hf["num_attention_heads"],
            num_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            rms_norm_eps=hf["rms_norm_eps"],
            rope=_rope(hf),
            max_position_embeddings=hf["max_position_embeddings"],
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            layers=architecture.layers(hf),
            quantization=Quantization.from_hf(hf),
        )

    def to_json(self) -> dict[str, Any]:
        """Give the fields for a JSON document. Bases are fingerprinted with them: those of a family stay as they are.

        `layers` is among them where layers differ, or have more than the two fields that stand beside their number, and
        `quantization` where linear modules are quantised.
        """
        fields, first = asdict(self), self.layers[0]
        layers = fields.pop("layers")
        if self.quantization is None:
            del fields["quantization"]
        fields |= {
            "rope": self.rope.to_hf(),
            "num_layers": self.num_layers,
            "qkv_bias": first.qkv_bias,
            "qk_norm": first.qk_norm,
        }
        return fields if {*self.layers} == {LayerSpec(first.qkv_bias, first.qk_norm)} else fields | {"layers": layers}


class Architecture(NamedTuple):
    """A family of bases.

    name     transformers'
    gguf     llama.cpp's name for it
    layers   from config.json
    refuses  why the checkpoint of a config.json is not served; None: it is
    """

    name: str
    gguf: str
    layers: Callable[[Mapping[str, Any]], tuple[LayerSpec, ...]]
    refuses: Callable[[Mapping[str, Any]], str | None]


def _dense(
    name: str, gguf: str, layer: LayerSpec = LayerSpec(), *, biases: tuple[str, ...] = (), has_window: bool = False
) -> Architecture:
    """A family whose layers are equal, with SwiGLU and full attention.

    biases      the fields with which config.json asks for biases that the decoder does not add
    has_window  a sliding window counts also where config.json does not say so
    """

    def refuses(hf: Mapping[str, Any]) -> str | None:
        if any(hf.get(bias) for bias in biases):
            return f"{name.removesuffix('ForCausalLM')} checkpoints with {' or '.join(biases)} are not supported"
        if hf.get("hidden_act", "silu") != "silu":
            return f"hidden_act {hf['hidden_act']!r} is not supported; only silu is"
        window = hf.get("sliding_window")
        if window and hf.get("use_sliding_window", has_window) and window < hf["max_position_embeddings"]:
            return f"sliding-window attention (window {window}) is not supported"
        return None

    return Architecture(name, gguf, lambda hf: (layer,) * hf["num_hidden_layers"], refuses)


ARCHITECTURES: Mapping[str, Architecture] = {
    family.name: family
    for family in (
        _dense("LlamaForCausalLM", "llama", biases=("attention_bias", "mlp_bias")),
        _dense("MistralForCausalLM", "llama", has_window=True),
        _dense("Qwen2ForCausalLM", "qwen2", LayerSpec(qkv_bias=True)),
        _dense("Qwen3ForCausalLM", "qwen3", LayerSpec(qk_norm=True), biases=("attention_bias",)),
    )
}


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
