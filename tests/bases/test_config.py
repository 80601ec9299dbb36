"""Families of bases, and RoPE scaled once and again against the equations."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from loray.bases.checkpoint import canonical_config, expected_shapes, plain_name
from loray.bases.config import ARCHITECTURES, Experts, LayerSpec, ModelConfig, scaled
from loray.bases.presets import preset
from loray.engine.model.decoder import frequencies
from loray.errors import UnsupportedError
from loray.spec import RopeParameters, RopeScaling

DIM = 64
PLAIN = RopeParameters(rope_theta=10000.0)
LINEAR = RopeParameters(rope_type="linear", rope_theta=10000.0, factor=4.0)
YARN = RopeParameters(rope_type="yarn", rope_theta=10000.0, factor=8.0, original_max_position_embeddings=4096)
LLAMA3 = RopeParameters(
    rope_type="llama3",
    rope_theta=500000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)


def plain(theta: float) -> NDArray[np.float64]:
    inverse: NDArray[np.float64] = theta ** (-np.arange(0, DIM, 2) / DIM)
    return inverse


def llama3(theta: float) -> NDArray[np.float64]:
    """Llama 3.1's: wavelengths above 8,192 divided by 8, below 2,048 kept, blended between."""
    inverse = plain(theta)
    blend = np.clip((8192 * inverse / (2 * np.pi) - 1.0) / (4.0 - 1.0), 0, 1)
    return inverse * (blend + (1 - blend) / 8.0)


def stretched(theta: float, factor: float) -> float:
    return theta * factor ** (DIM / (DIM - 2))


@pytest.mark.parametrize(
    ("base", "kind", "expected", "temperature"),
    [
        (PLAIN, "linear", plain(1e4) / 2, 1.0),
        (LINEAR, "linear", plain(1e4) / 8, 1.0),
        (PLAIN, "ntk", plain(stretched(1e4, 2)), 1.0),
        (LINEAR, "ntk", plain(stretched(1e4, 2)) / 4, 1.0),
        (LLAMA3, "ntk", llama3(stretched(5e5, 2)), 1.0),
        (YARN, "yarn", None, 1 + 0.1 * np.log(16)),
    ],
)
def test_frequencies(base: RopeParameters, kind: str, expected: NDArray[np.float64] | None, temperature: float) -> None:
    scaling = RopeScaling.model_validate({"type": kind, "factor": 2})
    found = frequencies(scaled(base, scaling, original_context=4096, head_dim=DIM), DIM)
    assert found.attention_factor == pytest.approx(temperature)
    if expected is None:  # once by the whole factor is the same
        once = RopeScaling(type="yarn", factor=16)
        expected = frequencies(scaled(PLAIN, once, original_context=4096, head_dim=DIM), DIM).inverse_d.numpy()
    np.testing.assert_allclose(found.inverse_d.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize(("base", "kind"), [(LLAMA3, "linear"), (YARN, "linear"), (LLAMA3, "yarn"), (LINEAR, "yarn")])
def test_what_is_no_rope_of_transformers_is_refused(base: RopeParameters, kind: str) -> None:
    scaling = RopeScaling.model_validate({"type": kind, "factor": 2})
    with pytest.raises(ValueError, match=f"is '{base.rope_type}' already, which {kind} cannot .* type: ntk"):
        scaled(base, scaling, original_context=4096, head_dim=DIM)


def test_longrope_is_not_scaled() -> None:
    """Beyond the original context transformers, which trains, has other frequencies than those that are served."""
    base = RopeParameters(
        rope_type="longrope",
        rope_theta=10000.0,
        factor=2.0,
        original_max_position_embeddings=4096,
        short_factor=(1.0,) * (DIM // 2),
        long_factor=(2.0,) * (DIM // 2),
    )
    with pytest.raises(ValueError, match=r"is 'longrope', .* leave rope_scaling out"):
        scaled(base, RopeScaling(type="ntk", factor=2), original_context=4096, head_dim=DIM)


TINY: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
}


def config_of(family: str, **fields: Any) -> ModelConfig:
    return ModelConfig.from_hf(TINY | {"architectures": [f"{family}ForCausalLM"]} | fields)


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("Llama", LayerSpec()),
        ("Mistral", LayerSpec()),
        ("Qwen2", LayerSpec(qkv_bias=True)),
        ("Qwen3", LayerSpec(qk_norm=True)),
    ],
)
def test_a_familys_layers(family: str, layer: LayerSpec) -> None:
    assert f"{family}ForCausalLM" in ARCHITECTURES
    config = config_of(family)
    assert config.layers == (layer, layer)
    assert config.attention_scale(1) == 8**-0.5
    shapes = expected_shapes(config)
    assert ("model.layers.1.self_attn.k_proj.bias" in shapes) == layer.qkv_bias
    assert ("model.layers.1.self_attn.k_norm.weight" in shapes) == layer.qk_norm


OF_MIXTRAL = {"num_local_experts": 6, "num_experts_per_tok": 2}
OF_QWEN3 = {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 10}


def test_a_familys_experts() -> None:
    mixtral, qwen3 = config_of("Mixtral", **OF_MIXTRAL), config_of("Qwen3Moe", **OF_QWEN3, norm_topk_prob=True)
    assert mixtral.layers == (LayerSpec(experts=Experts(6, 2)),) * 2
    assert qwen3.layers == (LayerSpec(qk_norm=True, experts=Experts(8, 3)),) * 2
    assert config_of("Qwen3Moe", **OF_QWEN3).experts == Experts(8, 3, normalised=False)
    assert (mixtral.intermediate_size, qwen3.intermediate_size) == (24, 10)
    shapes = expected_shapes(qwen3)
    assert shapes["model.layers.1.mlp.gate.weight"] == (8, 16)
    assert shapes["model.layers.1.mlp.experts.7.down_proj.weight"] == (16, 10)
    assert "model.layers.1.mlp.down_proj.weight" not in shapes
    attention = 16 * 16 + 2 * 8 * 16 + 16 * 16
    for num, elements in ((8, qwen3.num_matrix_elements), (3, qwen3.num_active_elements)):
        assert elements == 2 * (attention + num * 3 * 16 * 10 + 8 * 16) + 32 * 16


def test_the_layers_of_gpt_oss() -> None:
    config = preset("gpt-oss-20b")
    assert config is not None
    experts = Experts(32, 4, bias=True, limit=7.0, by_turns=True)
    windowed = LayerSpec(qkv_bias=True, o_bias=True, has_sinks=True, window=128, experts=experts)
    assert config.layers == (windowed, replace(windowed, window=None)) * 12
    assert config.window is None
    shapes = expected_shapes(config)
    assert shapes["model.layers.3.self_attn.sinks"] == (64,)
    assert shapes["model.layers.3.mlp.experts.31.up_proj.bias"] == (2880,)
    with pytest.raises(UnsupportedError, match=r"swiglu_alpha 1\.0 is not supported"):
        config_of("GptOss", **OF_MIXTRAL, swiglu_alpha=1.0)
    with pytest.raises(UnsupportedError, match="has to have rope_parameters"):
        config_of("GptOss", **OF_MIXTRAL)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("model.layers.3.block_sparse_moe.gate.weight", "model.layers.3.mlp.gate.weight"),
        ("model.layers.3.block_sparse_moe.experts.5.w1.weight", "model.layers.3.mlp.experts.5.gate_proj.weight"),
        ("model.layers.3.block_sparse_moe.experts.5.w2.weight", "model.layers.3.mlp.experts.5.down_proj.weight"),
        ("model.layers.3.block_sparse_moe.experts.5.w3.weight", "model.layers.3.mlp.experts.5.up_proj.weight"),
        ("model.layers.3.mlp.experts.5.up_proj.weight", "model.layers.3.mlp.experts.5.up_proj.weight"),
        ("model.layers.3.mlp.router.bias", "model.layers.3.mlp.gate.bias"),
    ],
)
def test_experts_have_one_name_in_all_families(name: str, plain: str) -> None:
    assert plain_name(name) == plain


@pytest.mark.parametrize(
    ("family", "fields", "why"),
    [
        ("Llama", {"mlp_bias": True}, "Llama checkpoints with attention_bias or mlp_bias are not supported"),
        ("Qwen3", {"attention_bias": True}, "Qwen3 checkpoints with attention_bias are not supported"),
        ("Qwen2", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported; only silu is"),
        ("Mixtral", OF_MIXTRAL | {"num_experts_per_tok": 7}, "gives a token 7 of 6 experts"),
        (
            "Qwen3Moe",
            OF_QWEN3 | {"mlp_only_layers": [0]},
            r"\(mlp_only_layers, decoder_sparse_step\) are not supported",
        ),
        ("Gemma", {"hidden_act": "silu"}, "hidden_act 'silu' is not supported in GemmaForCausalLM"),
        ("Gemma3", {"hidden_activation": "gelu"}, "hidden_activation 'gelu' is not supported in Gemma3ForCausalLM"),
        ("Gemma3", {"use_bidirectional_attention": True}, "with use_bidirectional_attention are not supported"),
        ("Gemma3", {"attn_logit_softcapping": 50.0}, "with attn_logit_softcapping are not supported"),
        ("Qwen2", {"is_causal": False}, "tokens attend to those after them"),
    ],
)
def test_why_a_familys_checkpoint_is_refused(family: str, fields: dict[str, Any], why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        config_of(family, **fields)


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("Mistral", {"sliding_window": 64}),  # as long as the context
        ("Qwen2", {"sliding_window": 32}),  # which it does not use
        ("Qwen2", {"attention_bias": True}),  # no field of its own
        ("Gemma", {"hidden_act": "gelu"}),  # by which its first checkpoints mean the approximation
    ],
)
def test_a_familys_checkpoint_is_served(family: str, fields: dict[str, Any]) -> None:
    assert config_of(family, **fields) == config_of(family)


@pytest.mark.parametrize(
    ("family", "fields", "windows"),
    [
        ("Mistral", {"sliding_window": 32}, (32, 32)),
        ("Qwen2", {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1}, (None, 32)),
        ("Qwen2", {"sliding_window": 32, "use_sliding_window": True}, (None, None)),  # from layer 28 on
        (
            "Qwen3",
            {"sliding_window": 8, "use_sliding_window": True, "layer_types": ["sliding_attention", "full"]},
            (8, None),
        ),
        ("Qwen3Moe", OF_QWEN3 | {"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1}, (32, 32)),
        ("Gemma2", {"sliding_window": 32}, (32, None)),
        ("Gemma3", {"sliding_window": 32}, (32, 32)),  # five of six
        ("Gemma3", {"sliding_window": 32, "sliding_window_pattern": 2}, (32, None)),
    ],
)
def test_windows_of_layers(family: str, fields: dict[str, Any], windows: tuple[int | None, ...]) -> None:
    config = config_of(family, **fields)
    assert tuple(layer.window for layer in config.layers) == windows
    assert config.window == (None if None in windows else max(w for w in windows if w))


@pytest.mark.parametrize(
    ("family", "model_type", "more"),
    [
        ("Llama", "llama", {}),
        ("Mistral", "mistral", {}),
        ("Qwen2", "qwen2", {"use_sliding_window": True, "max_window_layers": 1}),
        ("Qwen3", "qwen3", {"head_dim": 8, "use_sliding_window": True, "max_window_layers": 1}),
        ("Gemma", "gemma", {}),
        ("Gemma2", "gemma2", {}),
        ("Gemma3", "gemma3_text", {}),
        ("Phi3", "phi3", {}),
        ("Mixtral", "mixtral", OF_MIXTRAL),
        ("Qwen3Moe", "qwen3_moe", OF_QWEN3 | {"use_sliding_window": True}),
        ("GptOss", "gpt_oss", OF_MIXTRAL | {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}),
    ],
)
def test_what_config_json_lacks_is_what_transformers_takes(family: str, model_type: str, more: dict[str, Any]) -> None:
    from transformers import AutoConfig

    fields = TINY | more | {"max_position_embeddings": 8192, "eos_token_id": 1}
    named = {"architectures": [f"{family}ForCausalLM"]}
    whole = AutoConfig.for_model(model_type, **deepcopy(fields)).to_dict()
    assert ModelConfig.from_hf(fields | named) == ModelConfig.from_hf(whole | named)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            }
        },
        {"rope_scaling": {"rope_type": "linear", "factor": 8.0}},
    ],
)
def test_the_two_ropes_of_gemma_3(fields: dict[str, Any]) -> None:
    config = config_of("Gemma3", sliding_window=32, sliding_window_pattern=2, **fields)
    assert config.ropes == (
        RopeParameters(rope_type="linear", rope_theta=1e6, factor=8.0),
        RopeParameters(rope_theta=1e4),
    )
    assert [layer.rope for layer in config.layers] == [1, 0]
    assert config.tie_word_embeddings
    assert (config.norm_offset, config.embedding_scale) == (1.0, 4.0)
    fingerprints = {
        canonical_config(c) for c in (config, replace(config, norm_offset=0.0), replace(config, other_ropes=()))
    }
    assert len(fingerprints) == 3


def test_a_base_keeps_its_fingerprint() -> None:
    """Adapters name the base that they are for by it."""
    assert canonical_config(config_of("Qwen2", eos_token_id=3)) == (
        '{"architecture":"Qwen2ForCausalLM","head_dim":8,"hidden_size":16,"intermediate_size":24,'
        '"max_position_embeddings":64,"num_heads":2,"num_kv_heads":1,"num_layers":2,"qk_norm":false,"qkv_bias":true,'
        '"rms_norm_eps":1e-06,"rope":{"rope_theta":10000.0,"rope_type":"default"},"tie_word_embeddings":false,'
        '"vocab_size":32}'
    )


def test_layers_that_compute_otherwise_have_another_fingerprint() -> None:
    plain = config_of("Llama")
    first, *_ = plain.layers
    others = [
        replace(plain, layers=(first, LayerSpec(attention_scale=0.5))),
        replace(plain, layers=(LayerSpec(attention_scale=0.5),) * 2),
        replace(plain, layers=(LayerSpec(attention_scale=0.5), first)),
        replace(plain, layers=(first, LayerSpec(qk_norm=True))),
        replace(plain, layers=(first,) * 3),
    ]
    assert len({canonical_config(config) for config in (plain, *others)}) == 6
