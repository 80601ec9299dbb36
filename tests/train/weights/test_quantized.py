"""QLoRA on a tiny base, with bitsandbytes where it is installed."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from loray.adapters.convert import RoundedBase, merge_adapter
from loray.adapters.peft_format import read_adapter
from loray.bases import quantized
from loray.bases.quantized import dequantized, is_quantized, numel, rounded
from loray.bases.registry import BaseModel
from loray.errors import SpecError, UnsupportedError
from loray.methods.attach import initial_values
from loray.planning.run import shape_of
from loray.spec import QuantizationSpec, TrainSpec
from loray.train import checkpoint
from loray.train.model import build_model, count_parameters
from tests.fixtures.training import METHODS, curve, paired, recipe, run

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: pip install 'loray[qlora]'"
)
IDS = torch.arange(97, 137)[None]


def spec_of(method: str, quantization: dict[str, Any] | None = None, **fields: Any) -> TrainSpec:
    return recipe(method, quantization=quantization or {}, **fields)


def plain_with_rounded_weights(base: BaseModel, spec: TrainSpec) -> Any:
    """The same model, whose weights are those that the quantized one computes with."""
    assert spec.quantization is not None
    model = build_model(base, spec.model_copy(update={"quantization": None}))
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and path != "lm_head" and ".lora_" not in path:
            module.weight.data = rounded(module.weight.detach().clone(), spec.quantization)
    return model


def test_bitsandbytes_is_asked_for_and_strategies_that_shard_are_refused(
    base: BaseModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnsupportedError, match=r"needs bitsandbytes: pip install 'loray\[qlora\]'"):
        build_model(base, spec_of("lora"))
    with pytest.raises(SpecError, match="a quantized base is whole on every worker, and fsdp2 takes it apart: use ddp"):
        spec_of("lora", parallel={"strategy": "fsdp2"})


@needs_bitsandbytes
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("quantization", [{}, {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False}])
def test_it_computes_as_on_the_rounded_base(
    method: str, quantization: dict[str, Any], tiny_base: Callable[..., BaseModel]
) -> None:
    base = tiny_base("Qwen2ForCausalLM", tie_word_embeddings=True, std=0.05)
    spec = spec_of(method, quantization, max_steps=3)
    model, plain = build_model(base, spec).eval(), plain_with_rounded_weights(base, spec).eval()
    assert count_parameters(model) == count_parameters(plain)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    expected = {name: p for name, p in plain.named_parameters() if p.requires_grad}
    assert trained.keys() == expected.keys()
    assert all(p.dtype == expected[name].dtype for name, p in trained.items())
    for name, parameter in trained.items():
        assert torch.equal(parameter, expected[name]), name
    began = dict(initial_values(model))
    for name, value in initial_values(plain):  # the norms of the rounded rows, which it did not have when it was made
        value.copy_(began[name])
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-5)


@needs_bitsandbytes
@pytest.mark.parametrize("method", list(METHODS))
def test_a_run_learns_and_is_resumed_bit_for_bit(method: str, base: BaseModel, tmp_path: Path) -> None:
    spec = spec_of(method, max_steps=6, dtype="bfloat16", checkpoint={"interval_steps": 3})
    _, unbroken = run(spec, base, tmp_path)
    _, resumed = run(spec, base, tmp_path, resume_from=unbroken.checkpoints[0].path, name="resumed")
    assert curve(resumed) == curve(unbroken)[3:]
    losses = [loss for _, loss, *_ in curve(unbroken)]
    assert losses[-1] < losses[0]
    saved = checkpoint.read_state(unbroken.checkpoints[-1].path)
    assert saved.recipe.quantization == QuantizationSpec()  # which the manifest has, too
    other = spec.model_copy(update={"quantization": None})
    with pytest.raises(SpecError, match="quantization changed"):
        run(other, base, tmp_path, resume_from=unbroken.checkpoints[0].path, name="other")


@needs_bitsandbytes
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_preferences_are_learned_against_the_rounded_base(method: str, base: BaseModel, tmp_path: Path) -> None:
    """The reference of DPO is what the adapter is trained on: before the first step nothing tells both apart."""
    _, reporter = run(paired(method, quantization={}, max_steps=24), base, tmp_path)
    before, after = (e for e in reporter.events if e["event"] == "eval")
    assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert before["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert after["rewards/accuracies"] > 0.8
    assert after["eval_loss"] < 0.6


@needs_bitsandbytes
def test_an_adapter_merges_into_the_base_that_it_was_trained_on(base: BaseModel, tmp_path: Path) -> None:
    spec = recipe(
        quantization={}, adapter={"method": "lora", "rank": 4}, max_steps=3, optimizer={"learning_rate": 5e-2}
    )
    _, reporter = run(spec, base, tmp_path)
    weights = read_adapter(reporter.best.path / checkpoint.ADAPTER, base.config)
    assert spec.quantization is not None
    merge_adapter(base, weights, tmp_path / "as-trained", trained_on=RoundedBase(spec.quantization, torch.float32))
    merge_adapter(base, weights, tmp_path / "as-served")
    model = build_model(base, spec).eval()
    state = checkpoint.read_optimizer(reporter.best.path)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data.copy_(state.masters[name])
    expected = model(IDS).logits
    trained, served = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32)(IDS).logits
        for name in ("as-trained", "as-served")
    )
    torch.testing.assert_close(trained, expected, rtol=1e-4, atol=1e-4)
    assert (served - expected).abs().max() > 0.01


@needs_bitsandbytes
def test_it_takes_the_memory_that_is_planned(tiny_base: Callable[..., BaseModel]) -> None:
    base = tiny_base(num_hidden_layers=3, hidden_size=256, intermediate_size=512, num_attention_heads=4, head_dim=64)
    spec = spec_of("lora", dtype="bfloat16")
    model = build_model(base, spec)
    nbytes = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and is_quantized(m.weight)]
    assert len(layers) == 3 * 7
    for layer in layers:
        state: Any = layer.weight.quant_state
        nbytes += state.absmax.nbytes + state.state2.absmax.nbytes
        assert dequantized(layer).dtype == torch.bfloat16
        assert numel(layer.weight) == dequantized(layer).numel()
    assert nbytes == pytest.approx(shape_of(spec, base.config).base_bytes, rel=1e-3)
