"""Fixtures that this folder's tests share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.publishing import Destination, publish
from loray.settings import Settings
from loray.spec import AdapterRef
from loray.store import AdapterStore, open_store
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


@pytest.fixture
def published(base: BaseModel, peft_folder: Callable[..., Path], settings: Settings) -> Callable[..., AdapterRef]:
    """`published("a", "vera", seed=1)`: an adapter of this name in the home."""
    store = AdapterStore(open_store(settings.store))

    def make(name: str, method: str = "lora", seed: int = 0) -> AdapterRef:
        with closing(Catalog(settings.catalog)) as catalog:
            publish(peft_folder(base, method, seed), base, Destination(name, store, catalog))
            return catalog.adapters.resolve(name)

    return make
