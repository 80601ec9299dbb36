"""Adapters of a 16-bit base on its quantised forms: what is dequantised computes as those weights do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, VeraConfig
from safetensors.torch import save_file

from loray.bases.checkpoint import tensor_infos
from loray.bases.config import ARCHITECTURES
from loray.bases.registry import BaseModel, add_base
from loray.bases.rounding import add_rounded
from loray.bases.weights import WeightSource
from loray.errors import BaseMismatch
from loray_kernels import QuantizedWeight
from tests.fixtures import quantized as q
from tests.fixtures.engines import Spy, for_each, make_engine, request, run
from tests.fixtures.peft_adapters import ALL, ATTENTION, LINEAR_ROPE, Adapters, TestAdapter, make_adapters
from tests.fixtures.tiny import write_checkpoint

CONFIGS: dict[str, Any] = {
    "lora": (LoraConfig(r=4, target_modules=ALL), None),
    "dora": (LoraConfig(r=4, target_modules=ALL, use_dora=True), None),
    "vera": (VeraConfig(r=24, target_modules=["q_proj", "v_proj"], save_projection=False), None),
    "longlora": (LoraConfig(r=4, target_modules=ATTENTION, modules_to_save=["norm"]), LINEAR_ROPE),
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": q.GROUP, "desc_act": True}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


@pytest.mark.parametrize(
    ("config", "make"), [(GPTQ, partial(q.gptq, act_order=True)), (NF4, q.nf4)], ids=["desc_act", "NF4"]
)
def test_what_is_dequantised_computes_the_same(config: Any, make: Callable[..., q.Made], tmp_path: Path) -> None:
    folder, home = write_checkpoint(tmp_path / "form", dtype=torch.float32, std=0.05), tmp_path / "home"
    plain = write_checkpoint(tmp_path / "plain", dtype=torch.float32, std=0.05)
    dense = {name: t.float() for name, t in q.store(folder, config, make).items()}
    save_file(dense, plain / "model.safetensors", metadata={"format": "pt"})
    whole = add_base(str(plain), home=home)
    form = add_base(str(folder), home=home, of=whole)
    adapters = make_adapters(whole, tmp_path, CONFIGS, std=0.05)
    found = []
    for base in (whole, form):
        engine = make_engine(base, adapters)
        spy = Spy(engine)
        run(engine, for_each([None, *adapters]), together=True)
        found.append({name: torch.stack(rows) for name, rows in spy.logits.items()})
    assert found[0].keys() == found[1].keys() == {"0", "1", "2", "3", "4"}
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_family_has_forms(architecture: str, tiny_base: Callable[..., BaseModel]) -> None:
    whole = tiny_base(architecture, std=0.05)
    home = whole.path.parent.parent
    form = add_rounded(whole, "int8", home=home)
    weights, rounded = WeightSource(whole.path, whole.config), WeightSource(form.path, form.config)
    names = [info.name for info in tensor_infos(whole.path)]
    assert any(isinstance(rounded.read(name), QuantizedWeight) for name in names)
    for name in names:
        torch.testing.assert_close(rounded.dense(name), weights.dense(name), atol=0.002, rtol=0)
    logits = []
    for base in (whole, form):
        engine = make_engine(base)
        spy = Spy(engine)
        run(engine, for_each([None], max_tokens=1))
        logits.append(spy.logits["0"][0])
    assert not torch.equal(*logits)
    assert torch.cosine_similarity(*logits, dim=0) > 0.99


def test_adapters_of_another_base_are_refused(adapters: Adapters, base: Any) -> None:
    form = replace(base, name="form", fingerprint="8" * 64, of=base.fingerprint)
    engine, tone = make_engine(form, list(adapters.values())), adapters["r2"]
    engine.check(request("a", [1, 2], tone))
    stranger: TestAdapter = replace(tone, ref=replace(tone.ref, base_fingerprint="f" * 64))
    with pytest.raises(BaseMismatch, match="another base than 'form'"):
        engine.check(request("a", [1, 2], stranger))
