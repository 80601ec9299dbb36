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
from loray.errors import BaseMismatch, UnsupportedError
from loray.methods.attach import attach
from loray.methods.dora_module import DoraLinear
from loray.methods.weights import LoraWeights
from loray.spec import DoraSpec
from loray.train.checkpoint import save_adapter
from loray.train.optimizer import is_decayed
from loray_kernels import RowOverrides, RowTables
from loray_kernels.reference import ReferenceOps
from tests.fixtures.adapters import IDS, BaseFactory, check_training, recipe, trained, trained_parts

SPEC = DoraSpec(rank=4, alpha=6, target_modules=("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"))


def fill(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    ours = {path: module for path, module in model.named_modules() if isinstance(module, DoraLinear)}
    with torch.no_grad():
        for name, p in sorted(trained_parts(model).items()):
            noise = torch.randn(p.shape, generator=generator)
            module = ours.get(name.partition(".lora_")[0])
            if module is not None and "magnitude" in name:
                p.copy_(0.3 * noise.clamp(-1, 1) * module.initial_square_O.sqrt())
            else:
                p.copy_(p * (1 + 0.3 * noise.clamp(-1, 1)) if "magnitude" in name else 0.15 * noise)
    return model


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])  # without and with biases
def test_loss_and_gradients_are_pefts(tiny_base: BaseFactory, architecture: str) -> None:
    base = tiny_base(architecture, std=0.1)
    ours = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    attach(ours, SPEC, seed=0)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=list(SPEC.target_modules), use_dora=True)
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32), config)
    check_training(fill(ours), fill(theirs))


def test_a_module_is_the_papers_equation_in_fp64(tiny_base: BaseFactory) -> None:
    """h = m ⊙ (W + s B A) x / ‖W + s B A‖ + bias, with the norm as a constant of the gradient (section 4.3)."""
    base = tiny_base("Qwen2ForCausalLM", std=0.1)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    attach(model, SPEC, seed=0)
    module = fill(model).model.layers[1].self_attn.q_proj
    a, b = (part.weight.detach().double().requires_grad_() for part in (module.lora_A, module.lora_B))
    m = module.published(module.lora_magnitude_change.detach()).double().requires_grad_()
    x = torch.randn(3, a.shape[1], generator=torch.Generator().manual_seed(0))
    whole = module.base_layer.weight.double() + 1.5 * b @ a
    scale = m / whole.norm(dim=1).detach()
    expected = scale * F.linear(x.double(), whole) + module.base_layer.bias.double()
    expected.square().mean().backward()
    got = module(x)
    got.square().mean().backward()
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
    found = (module.lora_A.weight, module.lora_B.weight, module.lora_magnitude_change)
    for part, oracle in zip(found, (a, b, m), strict=True):
        assert part.grad is not None
        torch.testing.assert_close(part.grad.double(), oracle.grad, rtol=1e-4, atol=1e-5)
    weights = LoraWeights(*(part.detach() for part in found[:2]), 1.5, m.detach().float())
    torch.testing.assert_close(weights.output_scale(module.base_layer.weight).double(), scale, rtol=1e-6, atol=1e-6)


def test_in_16_bits_training_scales_as_serving_does(tiny_base: BaseFactory, tmp_path: Path) -> None:
    """To the last bit: the same norms, and magnitudes that are published as they are trained."""
    base = tiny_base(dtype=torch.bfloat16, std=0.1)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16)
    attach(model, SPEC, seed=0)
    save_adapter(fill(model), SPEC, tmp_path)
    pool = torch.zeros(4096, dtype=torch.bfloat16)
    for key, weights in read_adapter(tmp_path, base.config).modules.items():
        module = model.model.get_submodule(key.path)
        assert isinstance(weights, LoraWeights)
        served_O = (weights.output_scale(module.base_layer.weight.detach()) - 1).bfloat16()
        assert torch.equal(module.excess_scale().bfloat16(), served_O)
        x_TI = torch.randn(3, weights.a_RI.shape[1], generator=torch.Generator().manual_seed(0)).bfloat16()
        plain_TO = module.base_layer(x_TI) + 1.5 * module.lora_B(module.lora_A(x_TI))
        pool[64 : 64 + len(served_O)] = served_O
        own = RowOverrides(torch.arange(3), RowTables(((0, len(served_O), torch.full((3,), 64)),)))
        expected_TO = plain_TO.detach().clone()
        ReferenceOps().scale_rows(expected_TO, None, pool, own, 0)
        assert torch.equal(module(x_TI), expected_TO)


def test_untrained_it_changes_no_bit_and_all_is_of_the_bases_dtype(tiny_base: BaseFactory) -> None:
    base = tiny_base(dtype=torch.bfloat16, std=0.1)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16)
    plain = model(input_ids=IDS).logits
    attach(model, SPEC, seed=0)
    assert {p.dtype for p in trained_parts(model).values()} == {torch.bfloat16}
    assert not any(is_decayed(name) for name in trained_parts(model) if "magnitude" in name)
    assert torch.equal(model(input_ids=IDS).logits, plain)


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
