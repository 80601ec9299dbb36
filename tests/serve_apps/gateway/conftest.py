"""Fixtures that this folder's tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.gateway import GatewayClient, ScriptedEngines, gateway_app


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base()


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(sqlite_catalog(tmp_path))


@pytest.fixture(scope="session")
def long_base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    """Whose context has room for the description of tools."""
    return tiny_base(max_position_embeddings=4096)


ClientOf = Callable[..., AbstractContextManager[GatewayClient]]


def _clients(base: BaseModel, folder: Path) -> ClientOf:
    @contextmanager
    def make(engines: ScriptedEngines, **spec: Any) -> Iterator[GatewayClient]:
        app = gateway_app(base, sqlite_catalog(folder), engines, **spec)
        with GatewayClient(app, raise_server_exceptions=False) as client:
            client.base = base.name
            yield client

    return make


@pytest.fixture
def client_of(base: BaseModel, tmp_path: Path) -> ClientOf:
    return _clients(base, tmp_path)


@pytest.fixture
def long_client_of(long_base: BaseModel, tmp_path: Path) -> ClientOf:
    return _clients(long_base, tmp_path)
