"""A gateway with keys, on a scripted engine: what its clients can do to each other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi.testclient import TestClient

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.gateway import ScriptedEngines, gateway_app
from tests.fixtures.keys import access_of


@dataclass(frozen=True)
class Front:
    """`engines` has the requests that the gateway let through. `keys`: by tenant."""

    client: TestClient
    engines: ScriptedEngines
    base: str
    keys: dict[str, str]

    def post(self, tenant: str, path: str, **body: Any) -> httpx.Response:
        """As the tenant, to the model that is served unless `body` names another one."""
        headers = {"Authorization": f"Bearer {self.keys[tenant]}"}
        return self.client.post(path, json={"model": self.base} | body, headers=headers)


@contextmanager
def front(
    base: BaseModel, folder: Path, tenants: tuple[str, ...], engines: ScriptedEngines, **spec: Any
) -> Iterator[Front]:
    """Each tenant has one key, which may ask and is no administrator's."""
    url = sqlite_catalog(folder)
    catalog = Catalog(url)
    keys = {}
    for tenant in tenants:
        catalog.tenants.create(tenant)
        keys[tenant] = catalog.keys.create(f"key of {tenant}", tenant=tenant, scopes=frozenset({"infer"})).secret
    catalog.close()
    app = gateway_app(base, url, engines, access=access_of(url, host="0.0.0.0"), **spec)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield Front(client, engines, base.name, keys)
