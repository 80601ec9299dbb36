"""IA³: trained, merged and read as PEFT does it; what it cannot be is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, get_peft_model
from transformers import AutoModelForCausalLM

from jobs.driver.prepare import check_initial
from loray.adapters.convert import merge_adapter, to_lora, write_gguf
from loray.adapters.manifest import describe
from loray.adapters.peft_format import CONFIG_FILE, read_adapter
from loray.errors import BaseMismatch, SpecError, UnsupportedError
from loray.methods.attach import attach
from loray.methods.weights import AdapterWeights
from loray.spec import LINEAR_MODULES
from loray.spec.methods import Ia3Spec
from loray.train.checkpoint import save_adapter
from tests.fixtures.adapters import IDS, BaseFactory, check_training, in_peft, logits, recipe, trained, trained_parts

SPEC = Ia3Spec(target_modules=LINEAR_MODULES)


def fill(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in sorted(trained_parts(model).items()):
            p.copy_(1 + 0.3 * torch.randn(p.shape, generator=generator))
    return model


def peft_folder(base: Any, folder: Path, **options: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    fill(get_peft_model(model, IA3Config(**options))).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen2ForCausalLM"])  # without and with biases
def test_loss_and_gradients_are_pefts(tiny_base: BaseFactory, architecture: str) -> None:
    base = tiny_base(architecture, std=0.1)
    ours = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)
    attach(ours, SPEC, seed=0)
    config = IA3Config(target_modules=list(LINEAR_MODULES), feedforward_modules=["down_proj"])
    theirs = get_peft_model(AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32), config)
    check_training(fill(ours), fill(theirs))


def test_vectors_are_fp32_and_begin_where_nothing_changes(tiny_base: BaseFactory) -> None:
    base = tiny_base("Qwen2ForCausalLM", dtype=torch.bfloat16, std=0.1)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16)
    plain = model(input_ids=IDS).logits
    attach(model, SPEC, seed=0)
    assert {p.dtype for p in trained_parts(model).values()} == {torch.float32}
    assert torch.equal(model(input_ids=IDS).logits, plain)


def test_merged_it_computes_the_same_and_is_no_lora(tiny_base: BaseFactory, tmp_path: Path) -> None:
    """Of a base with biases, which are scaled too."""
    base, spec = tiny_base("Qwen2ForCausalLM", std=0.1), recipe({"adapter": SPEC.model_dump()})
    model = trained(base, spec)
    save_adapter(model, spec.adapter, tmp_path / "adapter")
    weights = read_adapter(tmp_path / "adapter", base.config)
    manifest = describe(tmp_path / "adapter", base)
    assert (manifest.method, manifest.rank, manifest.num_parameters) == ("ia3", 0, 2 * (64 + 32 + 32 + 64 + 3 * 128))
    merge_adapter(base, weights, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    for same in (merged, in_peft(base, model, tmp_path / "adapter")):
        torch.testing.assert_close(logits(same), logits(model), rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedError):
        to_lora(weights, base.config)
    with pytest.raises(UnsupportedError, match="IA³ multiplies outputs, which no LoRA does: take the adapter merged"):
        write_gguf(weights, base.config, tmp_path / "adapter.gguf")


def test_inputs_are_scaled_of_the_mlps_last_matrix_alone(tiny_base: BaseFactory, tmp_path: Path) -> None:
    base = tiny_base(std=0.1)
    folder = peft_folder(base, tmp_path, target_modules=["k_proj", "o_proj"], feedforward_modules=["o_proj"])
    with pytest.raises(UnsupportedError, match=r"o_proj multiplies its input .* train it with feedforward_modules"):
        read_adapter(folder, base.config)
    with pytest.raises(BaseMismatch, match=r"k_proj ia3_l has shape \(32, 1\)"):
        read_adapter(
            peft_folder(base, tmp_path, target_modules=["k_proj"], feedforward_modules=[]),
            tiny_base(std=0.1, num_key_value_heads=4).config,
        )


def test_a_run_goes_on_from_an_adapter_of_the_same_vectors_alone(tiny_base: BaseFactory, tmp_path: Path) -> None:
    base, spec = tiny_base(std=0.1), Ia3Spec(target_modules=("v_proj", "down_proj"))

    def weights_of(*feedforward: str) -> AdapterWeights:
        options = {"target_modules": ["v_proj", "down_proj"], "feedforward_modules": list(feedforward)}
        return read_adapter(peft_folder(base, tmp_path / "-".join(("adapter", *feedforward)), **options), base.config)

    check_initial(spec, weights_of("down_proj"), base.config, "tone@1")
    with pytest.raises(SpecError, match="its target_modules are down_proj, v_proj"):
        check_initial(Ia3Spec(), weights_of("down_proj"), base.config, "tone@1")
    with pytest.raises(SpecError, match="its down_proj multiplies outputs"):
        check_initial(spec, weights_of(), base.config, "tone@1")


def test_recipes_say_what_it_does_not_have() -> None:
    def parsed(**fields: Any) -> Any:
        whole = recipe({"adapter": {"method": "ia3"}}).model_dump(mode="json")
        return type(recipe({"adapter": {"method": "ia3"}})).parse(whole | fields, source="recipe")

    for fields, message in (
        ({"adapter": {"method": "ia3", "rank": 8}}, "rank"),
        ({"adapter": {"method": "ia3", "dropout": 0.1}}, "dropout"),
        ({"parallel": {"strategy": "fsdp2"}, "num_workers": 2}, "fp32 vectors, which fsdp2 does not hold: use ddp"),
        ({"optimizer": {"learning_rate": 1e-2, "loraplus_lr_ratio": 16}}, "LoRA's B, which ia3 does not train"),
    ):
        with pytest.raises(SpecError, match=message):
            parsed(**fields)
    (doubt,) = parsed(optimizer={"learning_rate": 2e-4}).warnings
    assert "IA³" in doubt
    assert not parsed(optimizer={"learning_rate": 3e-3}).warnings


def test_a_configuration_of_pefts_defaults_is_read(tiny_base: BaseFactory, tmp_path: Path) -> None:
    base = tiny_base(std=0.1)
    folder = peft_folder(base, tmp_path, task_type="CAUSAL_LM")  # k_proj, v_proj, down_proj by the model's type
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert sorted(config["target_modules"]) == sorted(Ia3Spec().target_modules)
    assert describe(folder, base).target_modules == ("k_proj", "v_proj", "down_proj")
