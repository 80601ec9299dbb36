"""A tiny base and adapters of each kind for it, made once; tests that need others make them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from loray.bases.registry import BaseModel
from loray.spec import RopeParameters

if TYPE_CHECKING:
    from tests.fixtures.peft_adapters import TestAdapter

_ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.fixture(scope="session")
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base()


@pytest.fixture(scope="session")
def adapters(base: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TestAdapter]:
    """LoRA of three ranks, LongLoRA with rows of every kind, two VeRA of one pair and one of another."""
    from peft import LoraConfig, VeraConfig

    from tests.fixtures.peft_adapters import NORMS, make_adapter

    folder = tmp_path_factory.mktemp("adapters")
    configs = {
        **{f"r{r}": LoraConfig(r=r, target_modules=_ATTENTION) for r in (2, 5, 8)},
        "longlora": LoraConfig(r=3, target_modules=_ATTENTION, modules_to_save=["embed_tokens", *NORMS]),
        "vera-a": VeraConfig(r=24, target_modules=["q_proj", "v_proj"], save_projection=False),
        "vera-b": VeraConfig(r=24, target_modules=["q_proj", "v_proj"], save_projection=False),
        "vera-c": VeraConfig(r=64, target_modules=["q_proj"], save_projection=False, projection_prng_key=3),
    }
    rope = RopeParameters(rope_type="linear", rope_theta=10000.0, factor=2.0)
    return {
        name: make_adapter(
            base, folder / name, config, seed=i, std=0.12, rope=rope if name == "longlora" else None, num_token_rows=20
        )
        for i, (name, config) in enumerate(configs.items())
    }
