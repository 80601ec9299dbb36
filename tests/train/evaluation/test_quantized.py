"""Quantised bases are measured as engines compute with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from loray.bases.config import ARCHITECTURES
from loray.bases.quantization import RoundedTo
from loray.bases.registry import BaseModel, add_base
from loray.bases.rounding import add_rounded
from loray.bases.weights import WeightSource
from loray.train.evaluation.measure import MeasuredModel, load
from loray_kernels import QuantizedWeight
from loray_kernels.reference import quantized_linear
from tests.fixtures.draws import Normal
from tests.fixtures.tiny import write_checkpoint


@pytest.mark.parametrize("to", ["int8", "fp8", "int4"])
def test_linear_modules_compute_what_the_op_does(to: RoundedTo, tmp_path: Path) -> None:
    base = add_base(str(write_checkpoint(tmp_path / "tiny", num_hidden_layers=1)), home=tmp_path / "home")
    form = add_rounded(base, to, home=tmp_path / "home")
    model = load(form, MeasuredModel("base"), dtype="float32", device=torch.device("cpu")).model
    weight = WeightSource(form.path, form.config).read("model.layers.0.mlp.up_proj.weight")
    assert isinstance(weight, QuantizedWeight)
    x_BTD = Normal(0)(2, 3, 64)
    x_BTD[0, 0, 5] = 200.0  # so much larger than its row that it goes beyond 8 bits on a CPU
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
    logits = []
    for each in (base, form):
        model = load(each, MeasuredModel("base"), dtype="float32", device=torch.device("cpu")).model
        logits.append(model(input_ids=torch.arange(60, 90)[None]).logits[0])
    assert not torch.equal(*logits)
    assert torch.cosine_similarity(*logits, dim=1).median() > 0.99  # a token may have another expert
