"""Fixtures that this folder's tests share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loray.bases.registry import BaseModel
from loray.settings import Settings
from tests.fixtures.replica import World


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings.from_env({"LORAY_HOME": str(tmp_path / "home")})


@pytest.fixture
def world(request: pytest.FixtureRequest, base: BaseModel, peft_folder: Callable[..., Path], tmp_path: Path) -> World:
    return World(base, peft_folder(base, getattr(request, "param", "lora")), tmp_path / "home")
