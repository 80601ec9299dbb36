"""Estimates of methods: density as the pool has it, training as it is planned, serving against what bounds it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from loray.bases.config import LayerSpec, ModelConfig
from loray.bases.presets import preset
from loray.engine.pool import packed as packing
from loray.engine.pool.packed import Packer
from loray.engine.pool.pool import Pool
from loray.methods import METHODS
from loray.methods.base import shapes as module_shapes
from loray.methods.vera import VeraWeights
from loray.methods.vera_module import draw_pair
from loray.methods.weights import AdapterWeights, LoraWeights, ModuleKey
from loray.planning.devices import PRESETS
from loray.planning.memory import plan_memory
from loray.planning.run import count_base, shape_of
from loray.recommend import GIB, Answers, adapter_shape, adapters_in, estimate_methods, recipe_of, recommend
from loray.spec import LINEAR_MODULES, AdapterRef, AdapterSpec, LoraSpec, VeraSpec
from loray_kernels import KvLayout

A100 = PRESETS["a100-80gb"]
MIB = 1 << 20


def shape(name: str = "smollm2") -> ModelConfig:
    found = preset(name)
    assert found is not None
    return found


SMALL = replace(shape(), layers=shape().layers[:3])
FUSED = replace(SMALL, has_fused_modules=True)


def weights(spec: AdapterSpec, model: ModelConfig) -> AdapterWeights:
    modules: dict[ModuleKey, LoraWeights | VeraWeights] = {}
    stored = module_shapes(spec, model)
    for layer in range(model.num_layers):
        for module, (out, width) in stored.items():
            if isinstance(spec, VeraSpec):
                own: LoraWeights | VeraWeights = VeraWeights(torch.ones(spec.rank), torch.ones(out))
            else:
                own = LoraWeights(torch.ones(spec.rank, width), torch.ones(out, spec.rank), 1.0)
            modules[ModuleKey(layer, module)] = own
    outs, widths = zip(*stored.values(), strict=True)
    pair = draw_pair(0, spec.rank, max(widths), max(outs)) if isinstance(spec, VeraSpec) else None
    return AdapterWeights(modules, pair)


@pytest.mark.parametrize(
    ("spec", "model"),
    [
        (LoraSpec(rank=8, target_modules=("q_proj", "v_proj")), SMALL),
        (LoraSpec(target_modules=LINEAR_MODULES), SMALL),
        (LoraSpec(target_modules=LINEAR_MODULES), FUSED),
        (VeraSpec(), SMALL),
        (VeraSpec(target_modules=LINEAR_MODULES), SMALL),
        (VeraSpec(target_modules=LINEAR_MODULES), FUSED),
    ],
)
def test_as_many_fit_as_an_idle_pool_takes(spec: AdapterSpec, model: ModelConfig) -> None:
    layout = KvLayout(SMALL.num_layers, 16, SMALL.num_kv_heads, SMALL.head_dim)
    num_blocks = 4 * MIB // (layout.num_layers * layout.layer_share * 2)
    pool = Pool(layout, num_blocks, dtype=torch.bfloat16, device=torch.device("cpu"))
    embedding_VD = torch.zeros(1, SMALL.hidden_size, dtype=torch.bfloat16)
    packed = Packer(pool.geometry, torch.bfloat16, embedding_VD, fused=model.fused).pack(weights(spec, model))
    number = 0
    while pool.place(ref(number), packed) is not None:
        number += 1
    assert adapters_in(spec, model, 4 * MIB) == number > 0


@pytest.mark.parametrize("layer", [LayerSpec(), LayerSpec(qk_norm=True), LayerSpec(norms="sandwich", qk_norm=True)])
def test_trained_norms_are_all_that_a_layer_has(layer: LayerSpec) -> None:
    model = replace(SMALL, layers=(layer,) * 3)
    (group,) = adapter_shape(LoraSpec(train_norms=True), model).groups
    norms = {matrix.module: matrix.width for matrix in group.matrices if matrix.role == "norm"}
    assert sum(norms.values()) == count_base(model).layer_norms
    assert len(norms) == layer.num_norms + 2 * layer.qk_norm
    assert norms.keys() <= packing._NORMS


def ref(number: int) -> AdapterRef:
    return AdapterRef(
        digest=f"{number:064x}",
        name=f"a{number}",
        version=1,
        method="lora",
        base_fingerprint="0" * 64,
        context_length=1,
        nbytes=1,
    )


def test_the_pair_alone_may_be_more_than_the_pool() -> None:
    assert adapters_in(VeraSpec(), shape(), MIB) == 0


def test_vera_is_twenty_times_as_dense_as_lora() -> None:
    lora, vera = (adapters_in(spec(target_modules=LINEAR_MODULES), shape(), 64 * MIB) for spec in (LoraSpec, VeraSpec))
    assert vera >= 20 * lora > 0


def test_a_base_with_fused_modules_has_estimates_of_every_method() -> None:
    """Of a module that a method's default names in part the other parts are trained, too."""
    found = {e.method: e for e in estimate_methods(Answers(2048, 10), FUSED, A100)}
    assert not any(e.problem for e in found.values())
    assert found["ia3"].settings.split(", ") == ["q", "k", "v", "down"]
    q_k_v = sum(FUSED.module_shape(module)[0] for module in ("q_proj", "k_proj", "v_proj"))
    assert found["ia3"].trained_parameters == 3 * (q_k_v + FUSED.module_shape("down_proj")[1])


def test_a_pair_is_read_once_for_modules_with_one_input() -> None:
    """Of fused modules all rows of B are read."""
    spec, method = VeraSpec(target_modules=LINEAR_MODULES), METHODS["vera"]
    hidden, wide, kv = 576, 1536, 192
    assert method.pair_reads(spec, SMALL) == 256 * (
        (hidden + hidden) + (hidden + hidden) + (hidden + wide) + (wide + hidden)
    )
    qkv, gate_up = hidden + 2 * kv, 2 * wide
    assert method.pair_reads(spec, FUSED) == 256 * (
        (hidden + qkv) + (hidden + hidden) + (hidden + gate_up) + (wide + hidden)
    )


def test_estimates_are_the_plans() -> None:
    found = {e.method: e for e in estimate_methods(Answers(2048, 10), shape(), A100)}
    names = ("lora", "dora", "vera", "miss", "longlora", "ia3", "road")
    lora, dora, vera, miss, longlora, ia3, road = (found[m] for m in names)
    run = shape_of(recipe_of(LoraSpec(), 2048), shape())
    assert lora.training_bytes == plan_memory(run, A100).peak_bytes
    assert list(found) == [*(method for method in METHODS if method != "longlora"), "longlora"]
    assert (lora.trained_parameters, lora.adapter_bytes) == (4_884_480, 9_768_960)
    outputs = 2 * 576 + 2 * 192 + 2 * 1536 + 576  # of all linear layers
    assert dora.trained_parameters == lora.trained_parameters + 30 * outputs  # magnitudes
    assert dora.step_s is not None
    assert lora.step_s is not None
    assert dora.step_s > lora.step_s
    assert dora.adapters_per_gib < lora.adapters_per_gib
    assert vera.trained_parameters == 30 * (outputs + 7 * 256)
    assert miss.trained_parameters == 30 * 32 * outputs
    assert miss.training_bytes is not None
    assert miss.training_bytes < lora.training_bytes
    assert miss.adapters_per_gib == pytest.approx(GIB / (2 * miss.trained_parameters), rel=0.05)
    assert longlora.trained_parameters == 921_600 + 49152 * 576 + 61 * 576
    assert (ia3.trained_parameters, ia3.settings) == (30 * (192 + 192 + 1536), "k, v, down")
    assert road.trained_parameters == 30 * outputs  # an angle and a scale of two outputs
    assert ia3.adapters_per_gib > road.adapters_per_gib > 10 * lora.adapters_per_gib
    assert min(ia3.throughput, road.throughput) > lora.throughput
    assert lora.adapters_per_gib == pytest.approx(GIB / 9_768_960, rel=0.05)
    assert vera.adapters_per_gib > 10 * lora.adapters_per_gib
    assert 0 < lora.throughput < vera.throughput < 1
    assert (lora.problem, lora.checkpointing, lora.served_devices) == (None, False, 1)


def test_a_context_beyond_the_window_is_longloras() -> None:
    found = {e.method: e for e in estimate_methods(Answers(32768, 5), shape("Llama-2-7b-hf"), A100)}
    assert list(found) == [*(method for method in METHODS if method != "longlora"), "longlora", "vera + longlora"]
    for method in ("lora", "dora", "vera"):
        assert "4096" in str(found[method].problem)
        assert found[method].training_bytes is found[method].step_s is None
    assert found["longlora"].problem is None
    assert found["longlora"].checkpointing
    assert found["vera + longlora"].training_bytes is not None


def test_what_does_not_fit_says_so() -> None:
    small = A100.model_copy(update={"memory_bytes": 20 * 10**9})
    (lora, *_) = estimate_methods(Answers(4096, 5), shape("Llama-2-13b-hf"), small)
    assert "does not fit" in str(lora.problem)
    assert lora.training_bytes is not None
    assert lora.training_bytes > small.usable_bytes


def test_remarks_follow_from_the_figures() -> None:
    said = " ".join(recommend(Answers(32768, 2000), "Llama-2-7b-hf", shape("Llama-2-7b-hf"), A100).remarks)
    assert "VeRA trained and S-LoRA served" in said
    assert "RoPE must be scaled" in said
    assert "2,000 adapters are" in said
    assert "as VeRA; " in said
    short = " ".join(recommend(Answers(8193, 1), "x", replace(shape(), max_position_embeddings=16384), A100).remarks)
    assert "need no LongLoRA" in short
    assert "as VeRA; " not in short
