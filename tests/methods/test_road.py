"""RoAd: its three variants are trained, merged and read as PEFT does it; what does not fit is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import RoadConfig, get_peft_model
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from loray.adapters.convert import merge_adapter, write_gguf
from loray.adapters.manifest import describe
from loray.adapters.peft_format import CONFIG_FILE, read_adapter
from loray.errors import BaseMismatch, IntegrityError, SpecError, UnsupportedError
from loray.methods import METHODS
from loray.methods.attach import attach
from loray.methods.road import RoadWeights
from loray.recipes.resolve import resolve
from loray.spec import LINEAR_MODULES
from loray.spec.methods import RoadSpec, RoadVariant
from loray.train.checkpoint import save_adapter
from tests.fixtures.adapters import IDS, BaseFactory, check_training, in_peft, logits, recipe, trained, trained_parts

VARIANTS: tuple[RoadVariant, ...] = ("road_1", "road_2", "road_4")


def fill(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in sorted(trained_parts(model).items()):
            p.add_(0.4 * torch.randn(p.shape, generator=generator))
    return model


@pytest.mark.parametrize("variant", VARIANTS)
def test_loss_and_gradients_are_pefts(tiny_base: BaseFactory, variant: RoadVariant) -> None:
    base = tiny_base("Qwen2ForCausalLM", std=0.1)  # with biases
    spec = RoadSpec(variant=variant, group_size=8, target_modules=LINEAR_MODULES)
    ours, plain = (AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32) for _ in range(2))
    attach(ours, spec, seed=0)
    theirs = get_peft_model(plain, RoadConfig(variant=variant, group_size=8, target_modules=list(LINEAR_MODULES)))
    mine = check_training(fill(ours), fill(theirs))
    assert sum(p.numel() for p in mine.values()) == 2 * sum(METHODS["road"].trained(spec, base.config))


def test_a_pair_is_turned_and_scaled_as_the_paper_says() -> None:
    """In fp64, by the matrix of each pair: R = α (cos θ, −sin θ; sin θ, cos θ)."""
    theta, alpha = torch.tensor([0.3, -1.2, 0.7, 2.0]), torch.tensor([1.5, 0.5, 1.0, -0.7])
    weights = RoadWeights(theta, alpha, "road_1", 4)  # pairs (0, 2), (1, 3), (4, 6), (5, 7)
    turned_OO = torch.zeros(8, 8, dtype=torch.float64)
    for n, (a, b) in enumerate([(0, 2), (1, 3), (4, 6), (5, 7)]):
        cos, sin = theta[n].double().cos() * alpha[n], theta[n].double().sin() * alpha[n]
        turned_OO[a, [a, b]] = torch.stack([cos, -sin])
        turned_OO[b, [a, b]] = torch.stack([sin, cos])
    matrix_OI = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    expected_OI = turned_OO @ matrix_OI.double()
    torch.testing.assert_close(weights.merged(matrix_OI, None).double(), expected_OI, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(weights.merged_bias(matrix_OI[:, 0]).double(), expected_OI[:, 0], rtol=1e-6, atol=1e-6)


def test_vectors_are_fp32_and_begin_where_nothing_changes(tiny_base: BaseFactory) -> None:
    base = tiny_base(dtype=torch.bfloat16, std=0.1)
    model = AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.bfloat16)
    plain = model(input_ids=IDS).logits
    attach(model, RoadSpec(group_size=32), seed=0)
    assert {p.dtype for p in trained_parts(model).values()} == {torch.float32}
    assert torch.equal(model(input_ids=IDS).logits, plain)


@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_it_computes_the_same(tiny_base: BaseFactory, tmp_path: Path, variant: RoadVariant) -> None:
    base = tiny_base("Qwen2ForCausalLM", std=0.1)
    adapter = {"method": "road", "variant": variant, "group_size": 16, "target_modules": LINEAR_MODULES}
    spec = recipe({"adapter": adapter})
    model = trained(base, spec)
    save_adapter(model, spec.adapter, tmp_path / "adapter")
    weights = read_adapter(tmp_path / "adapter", base.config)
    assert (describe(tmp_path / "adapter", base).method, weights.method) == ("road", "road")
    merge_adapter(base, weights, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    for same in (merged, in_peft(base, model, tmp_path / "adapter")):
        torch.testing.assert_close(logits(same), logits(model), rtol=1e-5, atol=1e-5)
    with pytest.raises(UnsupportedError, match="RoAd turns outputs, which no LoRA does: take the adapter merged"):
        write_gguf(weights, base.config, tmp_path / "adapter.gguf")


def test_groups_divide_outputs(tiny_base: BaseFactory, tmp_path: Path) -> None:
    base = tiny_base(std=0.1)
    spec = recipe({"adapter": {"method": "road", "group_size": 64}})
    with pytest.raises(SpecError, match="group_size 64 does not divide the 32 outputs of k_proj: lower it"):
        resolve(spec, base.config)
    with pytest.raises(ValidationError, match="group_size"):
        recipe({"adapter": {"method": "road", "group_size": 7}})


def test_what_the_files_say_must_agree(tiny_base: BaseFactory, tmp_path: Path) -> None:
    adapter = {"method": "road", "group_size": 32, "target_modules": ["q_proj", "k_proj"]}
    base, spec = tiny_base(std=0.1), recipe({"adapter": adapter})
    save_adapter(trained(base, spec), spec.adapter, tmp_path)
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    for change, error, message in (
        ({"variant": "road_3"}, UnsupportedError, "variant is 'road_3', not one of road_1, road_2, road_4"),
        ({"variant": "road_4"}, BaseMismatch, "has 8 outputs, which group_size 32 does not divide"),
        ({"variant": "road_2"}, BaseMismatch, "has 16 outputs, which group_size 32 does not divide"),
        ({"group_size": 7}, IntegrityError, "group_size is 7, not an even number"),
        ({"group_size": None}, IntegrityError, "group_size is None"),
    ):
        (tmp_path / CONFIG_FILE).write_text(json.dumps(config | change))
        with pytest.raises(error, match=message):
            read_adapter(tmp_path, base.config)
    (tmp_path / CONFIG_FILE).write_text(json.dumps(config | {"variant": "road_2", "group_size": 16}))
    with pytest.raises(BaseMismatch, match=r"road_theta has shape \(16,\), this base needs \(32,\)"):
        read_adapter(tmp_path, base.config)
