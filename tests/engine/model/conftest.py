"""Bases for tests of the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from loray.bases.registry import BaseModel


@pytest.fixture(params=["LlamaForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def any_base(tiny_base: Callable[..., BaseModel], request: pytest.FixtureRequest) -> BaseModel:
    """A tiny base of each architecture."""
    return tiny_base(request.param)
