"""Bases with experts: what is trained on them, how it is published, and what goes on from there."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from loray.adapters.peft_format import read_adapter
from loray.errors import SpecError
from loray.methods.attach import load_weights
from loray.recipes.resolve import resolve
from loray.spec import AdapterRef
from loray.train.checkpoint import save_adapter
from loray.train.model import BaseWeights, build_model, load_model
from tests.fixtures.engines import Spy, make_engine, prompts, request, run
from tests.fixtures.models import BaseFactory, model_recipe, strengthen, tokens
from tests.fixtures.peft_adapters import ALL, ATTENTION, TestAdapter, hf_model, sharing_weights
from tests.fixtures.tiny import EXPERTS

MODULES: dict[str, list[str]] = {
    "attention": ATTENTION,
    "all": ALL,
    "experts": ALL[4:],
    "down": ["v_proj", "down_proj"],
}


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize(("architecture", "modules"), [*product(EXPERTS, MODULES), ("GptOssForCausalLM", "attention")])
def test_what_is_trained_is_published_and_served(
    tiny_base: BaseFactory, tmp_path: Path, architecture: str, modules: str
) -> None:
    base = tiny_base(architecture)
    spec = model_recipe("lora", adapter={"target_modules": MODULES[modules]})
    resolve(spec, base.config)
    model = strengthen(build_model(base, spec)).eval()
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    assert any(".experts." in name for name in trained) == (modules != "attention")
    save_adapter(model, spec.adapter, tmp_path)

    ids = tokens(2, 24)
    expected = logits_of(model, ids)
    assert not torch.allclose(expected, logits_of(hf_model(base), ids), atol=1e-2)
    again = PeftModel.from_pretrained(sharing_weights(hf_model(base)), tmp_path).eval()
    torch.testing.assert_close(logits_of(again, ids), expected, atol=1e-5, rtol=1e-5)

    weights = read_adapter(tmp_path, base.config)
    assert {key.module for key in weights.modules} == {*MODULES[modules]}
    going_on = build_model(base, spec).eval()
    load_weights(going_on, weights)
    torch.testing.assert_close(logits_of(going_on, ids), expected, atol=1e-6, rtol=1e-6)

    ref = AdapterRef("a" * 64, "trained", 1, "lora", base.fingerprint, base.config.max_position_embeddings, 1, None)
    adapter = TestAdapter(ref, tmp_path, None)
    engine = make_engine(base, [adapter])
    spy, (prompt,) = Spy(engine), prompts(1)
    out = run(engine, [request("r", prompt, adapter)])["r"]
    whole = torch.tensor([[*prompt, *out[:-1]]])
    served = torch.stack(spy.logits["r"])
    torch.testing.assert_close(served, logits_of(model, whole)[0, len(prompt) - 1 :], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", [*EXPERTS, "GptOssForCausalLM"])
def test_parameters_are_read_one_by_one(tiny_base: BaseFactory, architecture: str) -> None:
    base = tiny_base(architecture)
    weights = BaseWeights(base, "float32")
    for name, parameter in load_model(base, dtype="float32").named_parameters():
        assert weights.has(name)
        assert torch.equal(weights.read(name), parameter)
        assert torch.equal(weights.read_rows(name, 1, 3), parameter[1:3])


@pytest.mark.parametrize(
    ("method", "adapter", "why"),
    [
        ("vera", {}, r"experts .*, which vera does not adapt: leave gate_proj, up_proj, down_proj out of"),
        ("dora", {"target_modules": ["up_proj"]}, "which dora does not adapt: leave up_proj out of"),
        ("lora", {"target_modules": ["up_proj"]}, "are one parameter: name both in adapter.target_modules"),
        ("lora", {"dropout": 0.1}, "adapter.dropout is not for experts"),
        ("lora", {"init": "pissa"}, "adapter.init: pissa is not for experts"),
    ],
)
def test_what_experts_do_not_take_is_refused(
    tiny_base: BaseFactory, method: str, adapter: dict[str, Any], why: str
) -> None:
    base = tiny_base("MixtralForCausalLM")
    with pytest.raises(SpecError, match=why):
        resolve(model_recipe(method, adapter=adapter), base.config)


def test_what_gpt_oss_does_not_take_is_refused(tiny_base: BaseFactory) -> None:
    base, adapter = tiny_base("GptOssForCausalLM"), {"target_modules": ATTENTION}
    s2 = model_recipe("lora", adapter=adapter, attention={"type": "s2", "group_size": 8})
    with pytest.raises(SpecError, match="has sinks, which only dense attention over whole rows has"):
        resolve(s2, base.config)
