"""Fixtures that this folder's tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.policy.routing import RoutingReports
from serve_apps.gateway.replicas import router
from tests.fixtures.catalogs import sqlite_catalog
from tests.serve_apps.gateway.routed import Replica
from tests.serve_apps.gateway.scripted import ScriptedEngines, gateway_app


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base()


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(sqlite_catalog(tmp_path))


@pytest.fixture
def client_of(base: BaseModel, tmp_path: Path) -> Callable[..., Any]:
    @contextmanager
    def make(engines: ScriptedEngines, **spec: Any) -> Iterator[TestClient]:
        app = gateway_app(base, sqlite_catalog(tmp_path), engines, **spec)
        with TestClient(app, raise_server_exceptions=False) as client:
            yield client

    return make


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> list[Replica]:
    """Two replicas of which no router of this process knows anything yet."""
    monkeypatch.setattr(router, "_decisions", {})
    monkeypatch.setattr(router, "_suspects", {})
    monkeypatch.setattr(router, "reports", RoutingReports())
    return [Replica("one"), Replica("two")]
