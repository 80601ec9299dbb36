"""PiSSA and OLoRA: trained as by PEFT, on a base that stays as it is, and published as LoRA of twice the rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from loray.adapters.manifest import describe
from loray.adapters.peft_format import WEIGHTS_FILE, read_config
from loray.bases.registry import BaseModel
from loray.methods import method_of
from loray.methods.attach import attach
from loray.methods.lora_module import decompose
from loray.planning.run import count_trained
from loray.spec import DoraSpec, LoraSpec
from loray.train.checkpoint import save_adapter
from tests.fixtures.adapters import IDS, BaseFactory
from tests.fixtures.training import assert_equal, curve, masters, recipe, run

MODULES = ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj")
INITS = ["pissa", "olora"]


def spec_of(init: str | None, **fields: Any) -> LoraSpec:
    return LoraSpec.model_validate({"rank": 4, "alpha": 6, "target_modules": MODULES, "init": init} | fields)


def loaded(base: BaseModel, dtype: torch.dtype = torch.float32) -> Any:
    return AutoModelForCausalLM.from_pretrained(base.path, dtype=dtype)


def trained(model: Any, num_steps: int = 4) -> Any:
    """By plain gradient descent, in which the sign of a row of A and of its column of B do not matter."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    for _ in range(num_steps):
        model(input_ids=IDS, labels=IDS).loss.backward()
        with torch.no_grad():
            for p in parameters:
                assert p.grad is not None
                p -= 0.05 * p.grad
                p.grad = None
    return model.eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(input_ids=IDS).logits
    return result


@pytest.mark.filterwarnings("ignore:.*changes the base weights of the model.*")
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("init", INITS)
def test_it_is_trained_and_published_as_by_peft(
    tiny_base: BaseFactory, tmp_path: Path, init: str, use_rslora: bool
) -> None:
    base, spec = tiny_base("Qwen2ForCausalLM", std=0.1), spec_of(init, use_rslora=use_rslora)
    ours, plain = loaded(base), logits(loaded(base))
    attach(ours, spec, seed=0)
    assert torch.equal(logits(ours), plain)
    config = LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=list(MODULES),
        init_lora_weights=init,
        use_rslora=use_rslora,  # type: ignore[arg-type]
    )
    theirs = get_peft_model(loaded(base), config)
    theirs.save_pretrained(tmp_path / "initial")
    expected = logits(trained(theirs))
    got = logits(trained(ours))
    assert (expected - plain).abs().max() > 0.01
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    save_adapter(ours, spec, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    for name in ("ours", "theirs"):
        again = PeftModel.from_pretrained(loaded(base), tmp_path / name).eval()
        torch.testing.assert_close(logits(again), expected, atol=1e-5, rtol=1e-5)
    manifest = describe(tmp_path / "ours", base)
    assert (manifest.method, manifest.rank) == ("lora", 8)
    mine, peft = (read_config(tmp_path / name) for name in ("ours", "theirs"))
    assert mine["r"] == peft["r"] == 8
    assert mine["lora_alpha"] == pytest.approx(peft["lora_alpha"])
    assert mine["init_lora_weights"] is True


@pytest.mark.parametrize("init", INITS)
def test_in_16_bits_the_published_change_is_the_trained_one(tiny_base: BaseFactory, tmp_path: Path, init: str) -> None:
    """What is rounded is the change, and not A and B, of which it is a small part."""
    base, spec = tiny_base(dtype=torch.bfloat16, std=0.1), spec_of(init)
    model = loaded(base, torch.bfloat16)
    attach(model, spec, seed=0)
    save_adapter(trained(model, 2), spec, tmp_path)
    exact = {name: load_file(tmp_path / WEIGHTS_FILE)[name].float() for name in load_file(tmp_path / WEIGHTS_FILE)}
    for path, module in model.named_modules():
        if path.rpartition(".")[2] in MODULES:
            a, b = (exact[f"base_model.model.{path}.lora_{part}.weight"] for part in "AB")
            da, db = (part.weight.detach().float() for part in (module.lora_A, module.lora_B))
            change = db @ (module.initial_a_RI.float() + da) + module.initial_b_OR.float() @ da
            assert (b @ a - change).norm() < 4e-3 * change.norm()


def test_decompositions() -> None:
    weight_OI = torch.randn(48, 32, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(weight_OI.double(), full_matrices=False)
    best = (left[:, :5] * values[:5]) @ right[:5]
    a, b = decompose(weight_OI, "pissa", 5, 1.5)
    torch.testing.assert_close(1.5 * (b @ a).double(), best, atol=1e-5, rtol=1e-5)
    torch.manual_seed(0)
    falling_OI = ((left * 0.5 ** torch.arange(32)) @ right).float()
    for exact, fast in zip(*(decompose(falling_OI, init, 5, 1.5) for init in ("pissa", "pissa_niter_16")), strict=True):
        torch.testing.assert_close(fast, exact, atol=1e-4, rtol=1e-3)
    a, b = decompose(weight_OI, "olora", 5, 1.5)
    torch.testing.assert_close(b.T @ b, torch.eye(5), atol=1e-5, rtol=0)
    for sign, init in ((1, "pissa"), (-1, "pissa"), (1, "olora")):
        a, _ = decompose(sign * weight_OI, init, 5, 1.5)  # type: ignore[arg-type]
        assert (a.gather(1, a.abs().argmax(dim=1, keepdim=True)) > 0).all()


def test_the_plan_counts_what_is_trained_and_what_is_published(tiny_base: BaseFactory) -> None:
    model = tiny_base().config
    default, pissa = (spec_of(init) for init in (None, "pissa"))
    assert count_trained(model, pissa) == count_trained(model, default)
    assert pissa.published == spec_of(None, rank=8, alpha=12)
    assert [m.rows for m in method_of(pissa).matrices(pissa, model)] == [8] * 10
    assert method_of(pissa).frozen(pissa, model) == sum(method_of(default).trained(default, model))
    assert spec_of("pissa", use_rslora=True).published.scale == pytest.approx(3)
    (problem,) = method_of(pissa).problems(spec_of("pissa", rank=40), model)
    assert problem.startswith("adapter.rank is 40, and v_proj (32 × 64) has no such part: take at most 32, or leave")
    assert not list(method_of(pissa).problems(pissa, model))
    with pytest.raises(ValueError, match="init"):
        DoraSpec.model_validate({"init": "pissa"})


def test_a_resumed_run_is_the_unbroken_one_wherever_it_began(
    tiny_base: BaseFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It takes A₀ and B₀ from the checkpoint: another machine's decomposition may be another one."""
    base = tiny_base(std=0.05)
    spec = recipe(
        adapter={"method": "lora", "rank": 4, "init": "pissa"}, dtype="bfloat16", checkpoint={"interval_steps": 3}
    )
    _, unbroken = run(spec, base, tmp_path)
    flipped = lambda *arguments: tuple(-part for part in decompose(*arguments))  # noqa: E731
    monkeypatch.setattr("loray.methods.lora_module.decompose", flipped)
    _, resumed = run(spec, base, tmp_path, resume_from=unbroken.checkpoints[0].path, name="resumed")
    assert curve(resumed) == curve(unbroken)[3:]
    assert_equal(masters(resumed), masters(unbroken))
