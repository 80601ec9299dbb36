"""LoRA made of PEFT's other kinds: PEFT's own conversion, with what it loses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AdaLoraConfig,
    FourierFTConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    OFTConfig,
    PeftModel,
    PromptTuningConfig,
    get_peft_model,
)
from peft.tuners.lora.conversion import convert_to_lora
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from loray.adapters.approximate import Approximation, approximate
from loray.adapters.peft_format import WEIGHTS_FILE, read_adapter, read_config
from loray.bases.registry import BaseModel
from loray.errors import UnsupportedError
from tests.fixtures.adapters import IDS, BaseFactory

MODULES = ["q_proj", "v_proj", "down_proj"]
KINDS: dict[str, Any] = {
    "LOHA": LoHaConfig(r=4, target_modules=MODULES, init_weights=False),
    "LOKR": LoKrConfig(r=4, target_modules=MODULES, init_weights=False),
    "FOURIERFT": FourierFTConfig(n_frequency=40, target_modules=MODULES, scaling=30, init_weights=False),
    "bat": MissConfig(r=8, target_modules=MODULES, init_weights="bat"),
    "mini": MissConfig(r=8, mini_r=16, target_modules=MODULES, init_weights="mini"),
}


def model_of(base: BaseModel) -> Any:
    return AutoModelForCausalLM.from_pretrained(base.path, dtype=torch.float32)


def saved(base: BaseModel, config: Any, folder: Path) -> Any:
    torch.manual_seed(0)
    model = get_peft_model(model_of(base), config)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad and not p.any():
                p.normal_(std=0.05)
    model.save_pretrained(folder)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(input_ids=IDS).logits
    return result


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_pefts_conversion(tiny_base: BaseFactory, tmp_path: Path, kind: str) -> None:
    base = tiny_base(std=0.1)
    model = saved(base, KINDS[kind], tmp_path / "other")
    found = approximate(tmp_path / "other", base, tmp_path / "lora", rank=12, energy=None)
    _, theirs = convert_to_lora(model, rank=12)
    ours = load_file(tmp_path / "lora" / WEIGHTS_FILE)
    assert len(ours) == len(theirs) == 12
    lost = {}
    for name in (n for n in ours if n.endswith("lora_A.weight")):
        other = name.replace("lora_A", "lora_B")
        torch.testing.assert_close(ours[other] @ ours[name], theirs[other] @ theirs[name], atol=1e-5, rtol=1e-4)
    whole, _ = convert_to_lora(model, rank=1.0), None
    for name in (n for n in whole[1] if n.endswith("lora_A.weight")):
        other = name.replace("lora_A", "lora_B")
        change = (whole[1][other] @ whole[1][name]).double()
        gone = change - (ours[other] @ ours[name]).double()
        lost[name.removeprefix("base_model.model.model.").removesuffix(".lora_A.weight")] = (
            float(gone.square().sum()),
            float(change.square().sum()),
        )
    total = sum(one for one, _ in lost.values()) / sum(own for _, own in lost.values())
    worst = max(one / own for one, own in lost.values())
    assert found.kind == read_config_type(KINDS[kind])
    assert found.rank == 12
    assert found.energy_lost == pytest.approx(total, abs=1e-6)
    assert found.worst_energy_lost == pytest.approx(worst, abs=1e-6)
    if total > 1e-4:
        assert lost[found.worst_module][0] / lost[found.worst_module][1] == pytest.approx(worst, rel=1e-3)
    assert len(read_adapter(tmp_path / "lora", base.config).modules) == 6
    if found.worst_energy_lost < 1e-9:  # exact: it computes the same
        again = PeftModel.from_pretrained(model_of(base), tmp_path / "lora").eval()
        torch.testing.assert_close(logits(again), logits(model), atol=1e-4, rtol=1e-4)


def read_config_type(config: Any) -> str:
    return str(config.peft_type.value)


@pytest.mark.filterwarnings("ignore")
def test_energy_decides_each_modules_rank(tiny_base: BaseFactory, tmp_path: Path) -> None:
    base = tiny_base(std=0.1)
    model = saved(base, KINDS["LOHA"], tmp_path / "other")
    found = approximate(tmp_path / "other", base, tmp_path / "lora", rank=None, energy=0.9)
    config, _ = convert_to_lora(model, rank=0.9)
    ranks = {key.path: module.rank for key, module in read_adapter(tmp_path / "lora", base.config).modules.items()}
    assert ranks == {path.removeprefix("model."): rank for path, rank in config.rank_pattern.items()}
    assert found.rank == max(ranks.values()) > min(ranks.values())
    assert 0 < found.energy_lost <= found.worst_energy_lost <= 0.1
    assert read_config(tmp_path / "lora")["lora_alpha"] == found.rank
    assert f"{Approximation('LOHA', 8, 0.0123, 'layers.0.self_attn.q_proj', 0.2)}" == (
        "LoRA of rank 8 made of LOHA: 1.23% of the change's energy is lost, at most 20.00% of a module's "
        "(layers.0.self_attn.q_proj)"
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            OFTConfig(oft_block_size=4, target_modules=["q_proj"]),
            "OFT adapters are not served",
        ),
        (
            AdaLoraConfig(init_r=6, target_r=4, total_step=100, target_modules=MODULES),
            "ADALORA adapters are not served",
        ),
        (PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"), "PROMPT_TUNING adapters are not served"),
        (
            LoHaConfig(r=4, target_modules=["lm_head"]),
            "LOHA .* and no LoRA can be made of lm_head",
        ),
    ],
)
def test_what_no_lora_approximates_is_refused_by_name(
    tiny_base: BaseFactory, tmp_path: Path, config: Any, message: str
) -> None:
    base = tiny_base(tie_word_embeddings=False)
    saved(base, config, tmp_path / "other")
    with pytest.raises(UnsupportedError, match=message):
        approximate(tmp_path / "other", base, tmp_path / "lora", rank=4, energy=None)
