"""Tiny random base models. A plugin of its own, which needs nothing but torch and transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from loray.bases.registry import BaseModel, add_base


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., BaseModel]:
    """`tiny_base("Qwen3ForCausalLM", num_hidden_layers=3)`: a random base, made once per set of arguments."""
    pytest.importorskip("torch", reason="weights are torch's", exc_type=ImportError)
    from tests.tiny import write_checkpoint

    made: dict[str, BaseModel] = {}

    def make(architecture: str = "LlamaForCausalLM", **config: Any) -> BaseModel:
        key = repr((architecture, sorted(config.items())))
        if key not in made:
            folder = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), architecture, **config)
            made[key] = add_base(str(folder), home=tmp_path_factory.mktemp("home"), name=f"tiny-{len(made)}")
        return made[key]

    return make
