"""`ModelConfig`, the configuration of a Llama-shaped base, how its RoPE is scaled, and the families of bases.

A family is one entry of ARCHITECTURES: what its layers have beside a plain one's, and which checkpoints the decoder
does not cover. Nothing else asks for a family by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any, Literal, NamedTuple, get_args

from loray.bases.quantization import Quantization
from loray.errors import UnsupportedError
from loray.spec import ATTENTION_MODULES, LINEAR_MODULES, MLP_MODULES, RopeParameters, RopeScaling, RopeType


@dataclass(frozen=True, slots=True)
class Experts:
    """The experts that a layer has in the place of its MLP: `num` MLPs. A router, which is a linear module, gives each
    token one logit for each of them. The token passes those with the `per_token` largest, and their results are added
    up in shares, which are a softmax of the logits.

    normalised  over the token's own experts, so that its shares add up to 1; else over all experts
    bias        of router and experts
    limit       of gpt-oss's gate and up, whose product is another one than SwiGLU's; None: it is SwiGLU's
    by_turns    where gate and up are one matrix, in checkpoints and PEFT's files, it has their outputs so
    """

    num: int
    per_token: int
    normalised: bool = True
    bias: bool = False
    limit: float | None = None
    by_turns: bool = False


# Modules that some families have as one, their rows one after the other.
FUSED: Mapping[str, tuple[str, ...]] = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
_FULL, _WINDOWED = "full_attention", "sliding_attention"  # transformers' types of layers
Norms = Literal["pre", "sandwich"]
Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """This says how a decoder layer differs from a plain one.

    qkv_bias         q, k and v have a bias; o_bias: o has one
    qk_norm          RMSNorm on each query and key head
    attention_scale  of scores; None: head_dim ** -0.5
    norms            before attention and MLP ("pre"), or also of their results ("sandwich")
    activation       of the MLP's gate
    window           tokens that a token attends to, itself included; None: all up to it
    rope             which of ModelConfig.ropes
    experts          in the place of one MLP; None: the layer is dense
    has_sinks        attention has one more key, whose value is 0, with a score of its own for each head
    """

    qkv_bias: bool = False
    qk_norm: bool = False
    attention_scale: float | None = None
    norms: Norms = "pre"
    activation: Activation = "silu"
    window: int | None = None
    rope: int = 0
    experts: Experts | None = None
    o_bias: bool = False
    has_sinks: bool = False

    @property
    def num_norms(self) -> int:
        """Count the RMSNorms of whole hidden states."""
        return 4 if self.norms == "sandwich" else 2


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A Llama-shaped decoder. Widths in elements, lengths in tokens; `intermediate_size` is each expert's where layers
    have experts.

    rope                what an adapter's own RoPE replaces; other_ropes: of layers with another one
    norm_offset         what RMSNorm adds to its weight
    embedding_scale     of the embedding's rows
    rotary_factor       of a head, what RoPE turns of it
    attention_soft_cap  c: a score s is c · tanh(s / c); None: it is s. logit_soft_cap: of logits, likewise
    quantization        of linear modules, if they are
    has_fused_modules   checkpoints and PEFT have the modules of FUSED as one; here they are modules of their own
    """

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
    other_ropes: tuple[RopeParameters, ...] = ()
    norm_offset: float = 0.0
    embedding_scale: float = 1.0
    attention_soft_cap: float | None = None
    logit_soft_cap: float | None = None
    rotary_factor: float = 1.0
    has_fused_modules: bool = False

    @property
    def rotary_dim(self) -> int:
        """The elements of a head that RoPE turns, the first ones."""
        return int(self.head_dim * self.rotary_factor)

    @property
    def ropes(self) -> tuple[RopeParameters, ...]:
        return (self.rope, *self.other_ropes)

    def hf_rope(self, rope: RopeParameters | None = None) -> dict[str, Any]:
        """Give transformers' `rope_parameters` with `rope`, or the base's own, as the first one."""
        first = (rope or self.rope).to_hf()
        if self.rotary_factor != 1.0:
            first["partial_rotary_factor"] = self.rotary_factor
        return {_FULL: first, _WINDOWED: self.other_ropes[0].to_hf()} if self.other_ropes else first

    @property
    def window(self) -> int | None:
        """The tokens behind which no layer looks; None where one looks at all."""
        windows = [layer.window for layer in self.layers]
        return None if None in windows else max(w for w in windows if w is not None)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def experts(self) -> Experts | None:
        """The experts of a layer, which are the same in all; None where they are dense."""
        return self.layers[0].experts

    @property
    def num_active_mlps(self) -> int:
        """MLPs of a layer that a token passes: its experts, or one."""
        return 1 if self.experts is None else self.experts.per_token

    def attention_scale(self, layer: int) -> float:
        scale = self.layers[layer].attention_scale
        return float(self.head_dim**-0.5) if scale is None else scale

    def module_shape(self, module: str) -> tuple[int, int]:
        """(out, in) of a linear module by its last name, for example `q_proj`, or of one of FUSED; of an expert's where
        there are some.
        """
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
            "qkv_proj": (q + 2 * kv, h),
            "gate_up_proj": (2 * m, h),
        }
        return shapes[module]

    @property
    def fused(self) -> Mapping[str, Mapping[str, slice]]:
        """The rows of each module in those that checkpoints have in its place."""
        found = {}
        for fused, modules in FUSED.items() if self.has_fused_modules else ():
            ends = [*accumulate((self.module_shape(module)[0] for module in modules), initial=0)]
            found[fused] = {module: slice(*own) for module, own in zip(modules, pairwise(ends), strict=True)}
        return found

    @property
    def num_matrix_elements(self) -> int:
        """The elements of all matrices: linear modules, those of every expert, routers and the output head."""
        return self._matrix_elements(1 if self.experts is None else self.experts.num)

    @property
    def num_active_elements(self) -> int:
        """The elements of all matrices that a token is multiplied with: of experts those of its own."""
        return self._matrix_elements(self.num_active_mlps)

    def _matrix_elements(self, num_mlps: int) -> int:
        attention, mlp = (
            sum(math.prod(self.module_shape(module)) for module in modules)
            for modules in (ATTENTION_MODULES, MLP_MODULES)
        )
        router = 0 if self.experts is None else self.experts.num * self.hidden_size
        return self.num_layers * (attention + num_mlps * mlp + router) + self.vocab_size * self.hidden_size

    def matrix_bytes(self, element_bytes: int, *, on_gpu: bool = False) -> int:
        """Count the bytes of `num_matrix_elements` in an engine whose dtype has `element_bytes`."""
        if self.quantization is None or not self.quantization.is_kept(on_gpu=on_gpu):
            return element_bytes * self.num_matrix_elements
        num_mlps, router = (1, 0) if self.experts is None else (self.experts.num, self.experts.num * self.hidden_size)
        layer = element_bytes * router
        for module in LINEAR_MODULES:
            out, width = self.module_shape(module)
            layer += (num_mlps if module in MLP_MODULES else 1) * out * self.quantization.row_bytes(width)
        return self.num_layers * layer + element_bytes * self.vocab_size * self.hidden_size

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> ModelConfig:
        """Read the dictionary of a `config.json`. Raises UnsupportedError for what the decoder does not compute."""
        given = (hf.get("architectures") or ["(none)"])[0]
        # An embedding model is saved without its head.
        name = given if given in ARCHITECTURES else f"{given.removesuffix('Model')}ForCausalLM"
        architecture = ARCHITECTURES.get(name)
        if architecture is None:
            raise UnsupportedError(
                f"architecture {given} is not supported; loray covers {', '.join(sorted(ARCHITECTURES))}"
            )
        if hf.get("is_causal") is False:
            raise UnsupportedError("tokens attend to those after them (is_causal is false); only decoders are served")
        hf = {**architecture.missing, **hf}
        if (why := architecture.refuses(hf)) is not None:
            raise UnsupportedError(why)
        eos = hf.get("eos_token_id")
        fields = architecture.fields(hf)
        found = cls(
            architecture=name,
            vocab_size=hf["vocab_size"],
            hidden_size=hf["hidden_size"],
            intermediate_size=hf.get("moe_intermediate_size") or hf["intermediate_size"],
            num_heads=hf["num_attention_heads"],
            num_kv_heads=hf.get("num_key_value_heads") or hf["num_attention_heads"],
            head_dim=hf.get("head_dim") or hf["hidden_size"] // hf["num_attention_heads"],
            rms_norm_eps=hf["rms_norm_eps"],
            rope=fields.get("rope") or _rope(hf),
            max_position_embeddings=hf["max_position_embeddings"],
            tie_word_embeddings=bool(hf.get("tie_word_embeddings", False)),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,),
            layers=architecture.layers(hf),
            quantization=Quantization.from_hf(hf),
        )
        return replace(found, **fields)

    def to_json(self) -> dict[str, Any]:
        """Give the fields for a JSON document. Bases are fingerprinted with them: those of a family stay as they are.

        `layers` is among them where layers differ, or have more than the two fields that stand beside their number.
        Fields that not every family has are among them where they are not the default, and `quantization` where linear
        modules are quantised.
        """
        first = self.layers[0]
        document = _not_default(self) | {
            "rope": self.rope.to_hf(),
            "num_layers": self.num_layers,
            "qkv_bias": first.qkv_bias,
            "qk_norm": first.qk_norm,
        }
        if self.other_ropes:
            document["other_ropes"] = [rope.to_hf() for rope in self.other_ropes]
        del document["layers"]
        if {*self.layers} != {LayerSpec(first.qkv_bias, first.qk_norm)}:
            document["layers"] = [_not_default(layer) for layer in self.layers]
        return document


def _not_default(of: ModelConfig | LayerSpec) -> dict[str, Any]:
    values = asdict(of)
    return {f.name: values[f.name] for f in fields(of) if getattr(of, f.name) != f.default}


class Architecture(NamedTuple):
    """A family of bases.

    name     transformers'
    gguf     llama.cpp's name for it
    layers   from config.json
    refuses  why the checkpoint of a config.json is not served; None: it is
    fields   of ModelConfig that are the family's own, from config.json
    ropes    the types of RoPE that transformers has for it, where not all
    missing  what transformers takes where config.json says nothing
    """

    name: str
    gguf: str
    layers: Callable[[Mapping[str, Any]], tuple[LayerSpec, ...]]
    refuses: Callable[[Mapping[str, Any]], str | None]
    fields: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda hf: {}
    ropes: tuple[str, ...] = get_args(RopeType)
    missing: Mapping[str, Any] = {}


def _dense(
    name: str,
    gguf: str,
    layer: LayerSpec = LayerSpec(),
    *,
    biases: tuple[str, ...] = (),
    has_window: bool = False,
    has_types: bool = True,
    missing: Mapping[str, Any] = {},
) -> Architecture:
    """A family whose layers differ in their windows alone, with SwiGLU.

    biases      the fields with which config.json asks for biases that the decoder does not add
    has_window  a sliding window counts also where config.json does not say so
    has_types   config.json says which layers have the window; else all have it
    missing     that of Architecture
    """

    def refuses(hf: Mapping[str, Any]) -> str | None:
        if any(hf.get(bias) for bias in biases):
            return f"{name.removesuffix('ForCausalLM')} checkpoints with {' or '.join(biases)} are not supported"
        return _refuses_activation(hf)

    def layers(hf: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
        types: Sequence[str] | None = None
        if not has_window and not hf.get("use_sliding_window"):
            types = [_FULL] * hf["num_hidden_layers"]
        elif has_types:
            first = hf.get("max_window_layers", 28)  # transformers' default
            types = hf.get("layer_types") or [
                _WINDOWED if i >= first else _FULL for i in range(hf["num_hidden_layers"])
            ]
        return tuple(replace(layer, window=window) for window in _windows(hf, types))

    return Architecture(name, gguf, layers, refuses, missing=missing)


def _refuses_activation(hf: Mapping[str, Any]) -> str | None:
    activation = hf.get("hidden_act", "silu")
    return None if activation == "silu" else f"hidden_act {activation!r} is not supported; only silu is"


def _windows(hf: Mapping[str, Any], types: Sequence[str] | None) -> Iterator[int | None]:
    """The window of each layer, by their types; of all layers without types. One as long as the context is none."""
    window = hf.get("sliding_window")
    is_shorter = window and window < hf["max_position_embeddings"]
    for i in range(hf["num_hidden_layers"]):
        yield window if is_shorter and (types is None or types[i] == _WINDOWED) else None


def _gemma(
    name: str,
    gguf: str,
    *,
    layer: LayerSpec,
    pattern: int,
    thetas: tuple[float, ...],
    soft_caps: tuple[float | None, float | None],
    activation: str = "hidden_activation",
    missing: Mapping[str, Any] = {"query_pre_attn_scalar": 256, "sliding_window": 4096},
) -> Architecture:
    """A Gemma: layers like `layer` with GeGLU, and most with a window; 1 + weight in norms.

    What config.json does not say:
    pattern    each so many layers one without a window
    thetas     of RoPE; a second one of layers with a window
    soft_caps  of attention and of logits
    missing    that of Architecture, beside head_dim
    `activation` is its name for the MLP's.
    """

    def refuses(hf: Mapping[str, Any]) -> str | None:
        own = hf.get(activation) or "gelu_pytorch_tanh"
        if own != "gelu_pytorch_tanh" and (activation, own) != ("hidden_act", "gelu"):  # which Gemma 1 means by it
            return f"{activation} {own!r} is not supported in {name}; only gelu_pytorch_tanh is"
        for field in (
            "attention_bias",
            "use_bidirectional_attention",
            *([] if soft_caps[0] else ["attn_logit_softcapping"]),
        ):
            if hf.get(field):
                return f"{name.removesuffix('ForCausalLM')} checkpoints with {field} are not supported"
        return None

    def layers(hf: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
        own, scale = hf.get("sliding_window_pattern") or pattern, hf.get("query_pre_attn_scalar")
        types = hf.get("layer_types") or [_WINDOWED if (i + 1) % own else _FULL for i in range(hf["num_hidden_layers"])]
        return tuple(
            replace(
                layer,
                attention_scale=scale and scale**-0.5,
                activation="gelu_tanh",
                window=window,
                rope=int(len(thetas) > 1 and kind == _WINDOWED),
            )
            for kind, window in zip(types, _windows(hf, types), strict=True)
        )

    def fields(hf: Mapping[str, Any]) -> Mapping[str, Any]:
        local = {
            "rope_parameters": (hf.get("rope_parameters") or {}).get(_WINDOWED),
            "rope_theta": hf.get("rope_local_base_freq", thetas[-1]),
        }
        return {
            "rope": _rope({"rope_theta": thetas[0], **hf}),
            "other_ropes": (_rope(local),) if len(thetas) > 1 else (),
            "tie_word_embeddings": bool(hf.get("tie_word_embeddings", True)),
            "norm_offset": 1.0,
            "embedding_scale": hf["hidden_size"] ** 0.5,
            "attention_soft_cap": hf.get("attn_logit_softcapping", soft_caps[0]),
            "logit_soft_cap": hf.get("final_logit_softcapping", soft_caps[1]),
        }

    return Architecture(name, gguf, layers, refuses, fields, missing={"head_dim": 256, **missing})


_SANDWICH = LayerSpec(norms="sandwich")


def _phi3() -> Architecture:
    """Phi-3 and Phi-4. Of LongRoPE the frequencies of the original context, which is what is served."""

    def layers(hf: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
        return tuple(LayerSpec(window=window) for window in _windows(hf, None))

    def fields(hf: Mapping[str, Any]) -> Mapping[str, Any]:
        raw = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
        rotary_factor = raw.pop("partial_rotary_factor", None) or hf.get("partial_rotary_factor") or 1.0
        kind, context = raw.pop("type", None) or raw.get("rope_type", "default"), hf["max_position_embeddings"]
        if kind in ("longrope", "su", "yarn"):  # older names of it
            original = raw.get("original_max_position_embeddings") or hf.get("original_max_position_embeddings", 4096)
            raw |= {"rope_type": "longrope", "original_max_position_embeddings": original}
            raw.setdefault("factor", context / original)
            context = min(context, original)
        return {
            "rope": _rope({**hf, "rope_parameters": raw, "rope_scaling": None}),
            "max_position_embeddings": context,
            "rotary_factor": float(rotary_factor),
            "has_fused_modules": True,
        }

    return Architecture("Phi3ForCausalLM", "phi3", layers, _refuses_activation, fields, ropes=("default", "longrope"))


def _experts(dense: Architecture, experts: Callable[[Mapping[str, Any]], Experts]) -> Architecture:
    """Make a family that differs from `dense` in that every layer has experts."""

    def layers(hf: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
        return tuple(replace(layer, experts=experts(hf)) for layer in dense.layers(hf))

    def refuses(hf: Mapping[str, Any]) -> str | None:
        if hf.get("mlp_only_layers") or hf.get("decoder_sparse_step", 1) != 1:
            return (
                "layers without experts among those with them (mlp_only_layers, decoder_sparse_step) are not supported"
            )
        own = experts(hf)
        if not 0 < own.per_token <= own.num:
            return f"config.json gives a token {own.per_token} of {own.num} experts"
        return dense.refuses(hf)

    return dense._replace(layers=layers, refuses=refuses)


def _gpt_oss() -> Architecture:
    """gpt-oss but for its experts: biases, sinks, and a window in every second layer."""

    def refuses(hf: Mapping[str, Any]) -> str | None:
        if hf.get("swiglu_alpha", 1.702) != 1.702:
            return f"swiglu_alpha {hf['swiglu_alpha']} is not supported; only 1.702 is"
        if not (hf.get("rope_parameters") or hf.get("rope_scaling")):
            return "config.json of a gpt-oss has to have rope_parameters"
        return None

    def layers(hf: Mapping[str, Any]) -> tuple[LayerSpec, ...]:
        types = hf.get("layer_types") or [_FULL if i % 2 else _WINDOWED for i in range(hf["num_hidden_layers"])]
        bias = bool(hf.get("attention_bias", True))
        return tuple(
            LayerSpec(qkv_bias=bias, o_bias=bias, has_sinks=True, window=window) for window in _windows(hf, types)
        )

    missing = {"head_dim": 64, "sliding_window": 128, "rope_theta": 150000.0}
    return Architecture("GptOssForCausalLM", "gpt-oss", layers, refuses, missing=missing)


ARCHITECTURES: Mapping[str, Architecture] = {
    family.name: family
    for family in (
        _dense("LlamaForCausalLM", "llama", biases=("attention_bias", "mlp_bias")),
        _dense("MistralForCausalLM", "llama", has_window=True, has_types=False, missing={"sliding_window": 4096}),
        _dense("Qwen2ForCausalLM", "qwen2", LayerSpec(qkv_bias=True), missing={"sliding_window": 4096}),
        _dense(
            "Qwen3ForCausalLM",
            "qwen3",
            LayerSpec(qk_norm=True),
            biases=("attention_bias",),
            missing={"sliding_window": 4096},
        ),
        _gemma(
            "GemmaForCausalLM",
            "gemma",
            layer=LayerSpec(),
            pattern=1,
            thetas=(1e4,),
            soft_caps=(None, None),
            activation="hidden_act",
            missing={},
        ),
        _gemma("Gemma2ForCausalLM", "gemma2", layer=_SANDWICH, pattern=2, thetas=(1e4,), soft_caps=(50.0, 30.0)),
        _gemma(
            "Gemma3ForCausalLM",
            "gemma3",
            layer=replace(_SANDWICH, qk_norm=True),
            pattern=6,
            thetas=(1e6, 1e4),
            soft_caps=(None, None),
        ),
        _phi3(),
        _experts(
            _dense("MixtralForCausalLM", "llama", has_window=True, has_types=False, missing={"rope_theta": 1e6}),
            lambda hf: Experts(hf["num_local_experts"], hf["num_experts_per_tok"]),
        ),
        _experts(
            _dense(
                "Qwen3MoeForCausalLM",
                "qwen3moe",
                LayerSpec(qk_norm=True),
                biases=("attention_bias",),
                has_types=False,
                missing={"sliding_window": 4096},
            ),
            lambda hf: Experts(
                hf.get("num_experts") or hf["num_local_experts"],
                hf["num_experts_per_tok"],
                normalised=bool(hf.get("norm_topk_prob", False)),
            ),
        ),
        _experts(
            _gpt_oss(),
            lambda hf: Experts(
                hf["num_local_experts"],
                hf["num_experts_per_tok"],
                bias=True,
                limit=hf.get("swiglu_limit", 7.0),
                by_turns=True,
            ),
        ),
    )
}


def _rope(hf: Mapping[str, Any]) -> RopeParameters:
    """transformers 5 writes `rope_parameters`; older checkpoints `rope_theta` and `rope_scaling`."""
    raw: dict[str, Any] = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    if _FULL in raw:  # beside that of layers with a window
        raw = dict(raw[_FULL])
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
    type, and ntk stretches theta under any type but longrope, whose frequencies depend on a row's length. Raises
    ValueError for other combinations, which are no RoPE that transformers computes, or that is served.
    """
    if base.rope_type == "longrope":
        raise ValueError(
            "its RoPE is 'longrope', of which transformers takes other frequencies for rows longer than the original "
            "context: leave rope_scaling out"
        )
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
