"""DoRA: the trained model's loss and gradients are PEFT's and the paper's; merged, it computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from loray.adapters.manifest import describe
from loray.adapters.peft_format import CONFIG_FILE, read_adapter
from loray.errors import BaseMismatch, SpecError, UnsupportedError
from loray.methods.attach import attach
from loray.methods.weights import LoraWeights
from loray.spec import DoraSpec
from loray.train.checkpoint import save_adapter
from loray.train.objectives import batch_loss
from loray.train.optimizer import is_decayed
from tests.fixtures.adapters import IDS, BaseFactory, batch, recipe, trained, trained_parts

SPEC = DoraSpec(rank=4, alpha=6, target_modules=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"))


def fill(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in sorted(trained_parts(model).items()):
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(p * (1 + 0.3 * noise.clamp(-1, 1)) if "magnitude" in name else 0.15 * noise)
    return model


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])  # without and with biases
def test_loss_and_gradients_are_pefts(tiny_base: BaseFactory, architecture: str) -> None:
    base = tiny_base(architecture, std=0.1)
    ours = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    attach(ours, SPEC, seed=0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(SPEC.target_modules), use_dora=True)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32), config)
    loss = batch_loss(fill(ours), batch()) / batch().num_targets
    loss.backward()
    peft_loss = fill(theirs)(input_ids=IDS, labels=IDS).loss
    peft_loss.backward()
    torch.testing.assert_close(loss, peft_loss, rtol=1e-5, atol=1e-5)
    mine, expected = trained_parts(ours), trained_parts(theirs)
    assert mine.keys() == expected.keys()
    for name, p in mine.items():
        assert p.grad is not None
        torch.testing.assert_close(p.grad, expected[name].grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_module_is_the_papers_equation_in_fp64(tiny_base: BaseFactory) -> None:
    """h = m ⊙ (W + s B A) x / ‖W + s B A‖ + bias, with the norm as a constant of the gradient (section 4.3)."""
    base = tiny_base("Qwen2ForCausalLM", std=0.1)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    attach(model, SPEC, seed=0)
    module = fill(model).model.layers[1].self_attn.q_proj
    a, b = (part["default"].weight.detach().double().requires_grad_() for part in (module.lora_A, module.lora_B))
    m = module.lora_magnitude_vector["default"].weight.detach().double().requires_grad_()
    x = torch.randn(3, a.shape[1], generator=torch.Generator().manual_seed(0))
    whole = module.base_layer.weight.double() + 1.5 * b @ a
    scale = m / whole.norm(dim=1).detach()
    expected = scale * F.linear(x.double(), whole) + module.base_layer.bias.double()
    expected.square().mean().backward()
    got = module(x)
    got.square().mean().backward()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    found = (module.lora_A["default"], module.lora_B["default"], module.lora_magnitude_vector["default"])
    for part, oracle in zip(found, (a, b, m), strict=True):
        torch.testing.assert_close(part.weight.grad.double(), oracle.grad, rtol=1e-4, atol=1e-5)
    weights = LoraWeights(*(part.weight.detach() for part in found[:2]), 1.5, found[2].weight.detach())
    torch.testing.assert_close(weights.output_scale(module.base_layer.weight).double(), scale, rtol=1e-6, atol=1e-6)


def test_untrained_it_changes_nothing_and_magnitudes_are_fp32(tiny_base: BaseFactory) -> None:
    base = tiny_base(dtype=torch.bfloat16, std=0.1)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16)
    plain = model(input_ids=IDS).logits
    attach(model, SPEC, seed=0)
    assert {p.dtype for n, p in trained_parts(model).items() if "magnitude" in n} == {torch.float32}
    assert {p.dtype for n, p in trained_parts(model).items() if "magnitude" not in n} == {torch.bfloat16}
    assert not any(is_decayed(name) for name in trained_parts(model) if "magnitude" in name)
    assert (model(input_ids=IDS).logits - plain).abs().max() < 0.05 * plain.abs().max()
    exact = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    plain = exact(input_ids=IDS).logits
    attach(exact, SPEC, seed=0)
    torch.testing.assert_close(exact(input_ids=IDS).logits, plain, rtol=1e-5, atol=1e-5)


def test_what_the_files_say_must_agree(tiny_base: BaseFactory, tmp_path: Path) -> None:
    base = tiny_base(std=0.1)
    spec = recipe({"adapter": SPEC.model_dump()})
    save_adapter(trained(base, spec), spec.adapter, tmp_path)
    assert describe(tmp_path, base).method == "dora"
    wrong = tiny_base(std=0.1, intermediate_size=96)
    with pytest.raises(BaseMismatch):
        read_adapter(tmp_path, wrong.config)
    config = (tmp_path / CONFIG_FILE).read_text()
    (tmp_path / CONFIG_FILE).write_text(config.replace('"use_dora": true', '"use_dora": false'))
    with pytest.raises(UnsupportedError, match="lora_magnitude_vector"):
        read_adapter(tmp_path, base.config)


def test_weights_are_not_sharded() -> None:
    fields = recipe({"adapter": SPEC.model_dump()}).model_dump()
    with pytest.raises(SpecError, match="which fsdp2 does not hold: use ddp"):
        type(recipe({"adapter": SPEC.model_dump()})).parse(
            fields | {"parallel": {"strategy": "fsdp2"}}, source="recipe"
        )
