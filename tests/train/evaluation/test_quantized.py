"""Quantised bases are measured as engines compute with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loray.bases import rounding
from loray.bases.config import ARCHITECTURES
from loray.bases.quantization import RoundedTo
from loray.bases.registry import BaseModel, add_base
from loray.bases.rounding import add_rounded, is_rounded
from loray.bases.weights import WeightSource
from loray.spec import LINEAR_MODULES
from loray.train.evaluation.measure import MeasuredModel, load
from loray_kernels import QuantizedWeight
from loray_kernels.reference import quantized_linear
from tests.fixtures.draws import Normal
from tests.fixtures.engines import Spy, make_engine, request, run
from tests.fixtures.tiny import write_checkpoint


@pytest.mark.parametrize("to", ["int8", "fp8", "int4"])
def test_linear_modules_compute_what_the_op_does(to: RoundedTo, tmp_path: Path) -> None:
    base = add_base(str(write_checkpoint(tmp_path / "tiny", num_hidden_layers=1)), home=tmp_path / "home")
    form = add_rounded(base, to, home=tmp_path / "home")
    model = load(form, MeasuredModel("base"), dtype="float32", device=torch.device("cpu")).model
    weight = WeightSource(form.path, form.config).read("model.layers.0.mlp.up_proj.weight")
    assert isinstance(weight, QuantizedWeight)
    x_BTD = Normal(0)(2, 3, 64)
    x_BTD[1, :, 5] = 100.0  # an outlier of its rows
    y_BTM = model.model.layers[0].mlp.up_proj(x_BTD)
    if to == "fp8":  # on a CPU it is dequantised, and activations stay as they are
        expected_TM = x_BTD.flatten(0, 1) @ weight.dequantized(slice(None), torch.float32).T
    else:
        expected_TM = quantized_linear(x_BTD.flatten(0, 1), weight)
    torch.testing.assert_close(y_BTM.flatten(0, 1), expected_TM, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_form_of_every_family_is_measured(architecture: str, tiny_base: Callable[..., BaseModel]) -> None:
    base = tiny_base(architecture, std=0.05)
    form = add_rounded(base, "int8", home=base.path.parent.parent)
    logits, ids = [], [*range(60, 90)]
    for each in (base, form):
        model = load(each, MeasuredModel("base"), dtype="float32", device=torch.device("cpu")).model
        logits.append(model(input_ids=torch.tensor([ids])).logits[0])
    assert not torch.equal(*logits)
    assert torch.cosine_similarity(*logits, dim=1).median() > 0.99  # a token may have another expert
    spy = Spy(engine := make_engine(form))
    run(engine, [request("a", ids, max_tokens=1)])
    got_V, expected_V = logits[1][-1], spy.logits["a"][0]
    # Activations that lie between two steps may be rounded to either.
    assert float((got_V - expected_V).square().mean().sqrt() / expected_V.std()) < 2e-3


@pytest.mark.parametrize("plain", ["down_proj", "v_proj"])
def test_what_a_checkpoint_leaves_in_16_bits_is_not_rounded(
    plain: str, tiny_base: Callable[..., BaseModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_base("LlamaForCausalLM", std=0.05)
    monkeypatch.setattr(rounding, "is_rounded", lambda name, shape: is_rounded(name, shape) and plain not in name)
    form = add_rounded(base, "int8", home=base.path.parent.parent, name=f"tiny-but-{plain}")
    model = load(form, MeasuredModel("base"), dtype="float32", device=torch.device("cpu")).model
    rounded = {name for name, m in model.named_modules() if m._forward_pre_hooks}
    beside = {"down_proj": {"down_proj"}, "v_proj": {"q_proj", "k_proj", "v_proj"}}[
        plain
    ]  # joined with those beside it
    assert {name.rpartition(".")[2] for name in rounded} == {*LINEAR_MODULES} - beside
    spy = Spy(engine := make_engine(form))
    run(engine, [request("a", ids := [*range(60, 90)], max_tokens=1)])
    got_V, expected_V = model(input_ids=torch.tensor([ids])).logits[0, -1], spy.logits["a"][0]
    assert float((got_V - expected_V).square().mean().sqrt() / expected_V.std()) < 2e-3
