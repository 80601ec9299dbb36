"""Bases for tests of the model, and adapters for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from peft import IA3Config, LoraConfig, MissConfig, RoadConfig, VeraConfig

from loray.bases.registry import BaseModel
from loray.spec import RopeParameters
from tests.fixtures.parity import case  # noqa: F401
from tests.fixtures.peft_adapters import ALL, ATTENTION, LINEAR_ROPE, NORMS, TestAdapter, make_adapters


@pytest.fixture(scope="session", params=["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def any_base(tiny_base: Callable[..., BaseModel], request: pytest.FixtureRequest) -> BaseModel:
    """A tiny base of each architecture."""
    return tiny_base(request.param)


@pytest.fixture(scope="session")
def any_adapters(any_base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> list[TestAdapter]:
    """Two VeRA of one pair, in one product, among them."""
    configs: dict[str, tuple[Any, RopeParameters | None]] = {
        "r16": (LoraConfig(r=16, target_modules=ALL), None),
        "dora": (LoraConfig(r=4, target_modules=ALL, use_dora=True), None),
        "norms": (LoraConfig(r=4, target_modules=ATTENTION, modules_to_save=NORMS), LINEAR_ROPE),
        "vera-a": (VeraConfig(r=20, target_modules=ALL, save_projection=False), None),
        "vera-b": (VeraConfig(r=20, target_modules=ALL, save_projection=False), None),
        "vera-c": (VeraConfig(r=7, target_modules=["q_proj"], projection_prng_key=3, save_projection=False), None),
        "r5": (LoraConfig(r=5, lora_alpha=9, target_modules=["v_proj", "up_proj"], rank_pattern={"up_proj": 3}), None),
        "miss": (MissConfig(r=6, target_modules=ALL), None),
        "layer 1": (LoraConfig(r=8, target_modules=ALL[2:6], layers_to_transform=[1]), None),
        "ia3": (IA3Config(target_modules=ALL, feedforward_modules=["down_proj"]), None),
        "road": (RoadConfig(group_size=8, target_modules=ALL), None),
    }
    return make_adapters(any_base, tmp_path_factory.mktemp("adapters"), configs, std=0.1)
