"""Both applications on one catalog, each as an HTTP client asks it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.policy.auth import KeyRing
from loray.spec import Principal, Scope, ServeSpec
from serve_apps.api.site import create_app as create_api
from serve_apps.auth import METRICS_KEY
from serve_apps.gateway.app import create_app as create_gateway
from serve_apps.gateway.bases import ServedBase
from serve_apps.gateway.directory import ModelResolver
from serve_apps.gateway.gateway import Gateway
from tests.fixtures.catalogs import sqlite_catalog
from tests.serve_apps.api.fakes import Api, mounted
from tests.serve_apps.gateway.scripted import ScriptedEngines
from tests.serve_apps.gateway.test_gateway import HELLO
from tests.serve_apps.keys import access_of

STATIC, METRICS = "the deployment's own key, which is long", "Prometheus's key, which is long as well"


def bearer(secret: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {secret}"}


@dataclass(frozen=True)
class Site:
    """`engines` has the requests that have passed."""

    gateway: TestClient
    api: TestClient
    catalog: Catalog
    base: str
    engines: ScriptedEngines

    def key(self, *scopes: Scope, **fields: Any) -> dict[str, str]:
        """The header of a new key, which both applications know already."""
        alias = f"key {len(self.catalog.keys(limit=1000).keys)}"
        header = bearer(self.catalog.create_key(alias, scopes=scopes, **fields).secret)
        self.refresh()
        return header

    def refresh(self) -> None:
        for client in (self.gateway, self.api):
            assert client.portal is not None
            client.portal.call(client.app_state["access"].refresh)

    def complete(self, headers: dict[str, str], **fields: Any) -> httpx.Response:
        body = {"model": self.base, "prompt": "a"} | fields
        return self.gateway.post("/v1/completions", json=body, headers=headers)


@pytest.fixture(scope="module")
def base(tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return tiny_base()


@pytest.fixture
def site_of(tmp_path: Path, base: BaseModel) -> Iterator[Callable[..., Site]]:
    with ExitStack() as held:

        def make(host: str = "0.0.0.0", *, static: bool = False) -> Site:
            url = sqlite_catalog(tmp_path)
            catalog, engines = Catalog(url), ScriptedEngines(HELLO)
            keys = {STATIC: Principal(key_id="deployment"), METRICS: Principal(scopes=frozenset(), key_id=METRICS_KEY)}
            hashed = {hashlib.sha256(key.encode()).digest(): principal for key, principal in keys.items()}
            ring = KeyRing(static=hashed if static else {})
            served = ServedBase.open(ServeSpec(base=base.name), base, engines)
            made = Api(tmp_path / "home", url)
            held.callback(made.close)
            held.callback(catalog.close)
            clients = []
            for app_of in (
                lambda access: create_gateway(Gateway([served], ModelResolver([base], access.follower)), access),
                lambda access: mounted(create_api(made.services, access)),
            ):
                access = access_of(url, host=host, ring=ring)
                client = TestClient(app_of(access), raise_server_exceptions=False)
                client.app_state["access"] = access
                clients.append(held.enter_context(client))
            clients[1].base_url = "http://testserver/api/v1/"
            return Site(clients[0], clients[1], catalog, base.name, engines)

        yield make
