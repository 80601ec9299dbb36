"""A home with a tiny base."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from loray.bases.registry import add_base
from loray.settings import Settings
from tests.fixtures.tiny import write_checkpoint


@pytest.fixture(scope="session")
def home_of_tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be copied."""
    folder = tmp_path_factory.mktemp("home")
    add_base(str(write_checkpoint(folder / "checkpoint", std=0.05)), home=folder / "home", name="tiny")
    return folder / "home"


@pytest.fixture
def settings(home_of_tiny: Path, tmp_path: Path) -> Settings:
    """A home of the test's own, with the base `tiny`."""
    return Settings.from_env({"LORAY_HOME": str(shutil.copytree(home_of_tiny, tmp_path / "home"))})
