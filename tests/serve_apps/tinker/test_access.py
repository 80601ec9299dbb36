"""Who may call the routes of Tinker's protocol, with which keys and how they are written."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from serve_apps.tinker.app import create_app
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.keys import access_of
from tests.serve_apps.tinker.asking import fronted

OPEN, BOTH = "open", frozenset({"infer", "train"})
TRAIN, INFER = frozenset({"train"}), frozenset({"infer"})
_CHECKPOINT = "/training_runs/{model_id}/checkpoints/{folder}/{name}"
TABLE: dict[str, frozenset[str] | str] = {
    "GET /healthz": OPEN,
    "GET /get_server_capabilities": BOTH,
    "POST /client/config": BOTH,
    "POST /client/dynamic_config": BOTH,
    "POST /telemetry": BOTH,
    "POST /create_session": BOTH,
    "POST /session_heartbeat": BOTH,
    "GET /sessions": BOTH,
    "GET /sessions/{session_id}": BOTH,
    "POST /sessions/{session_id}/finish": BOTH,
    "POST /create_model": TRAIN,
    "POST /load_weights": TRAIN,
    "POST /get_info": TRAIN,
    "POST /forward_backward": TRAIN,
    "POST /optim_step": TRAIN,
    "POST /save_weights": TRAIN,
    "POST /save_weights_for_sampler": TRAIN,
    "POST /create_sampling_session": INFER,
    "POST /join_sampling_session": INFER,
    "GET /samplers/{sampler_id}": INFER,
    "POST /asample": INFER,
    "POST /retrieve_future": BOTH,
    "POST /cancel_future": INFER,
    "POST /weights_info": TRAIN,
    "GET /training_runs": TRAIN,
    "GET /training_runs/{model_id}": TRAIN,
    "GET /training_runs/{model_id}/checkpoints": TRAIN,
    "GET /checkpoints": TRAIN,
    f"DELETE {_CHECKPOINT}": TRAIN,
    f"PUT {_CHECKPOINT}/ttl": TRAIN,
    **{
        f"POST /{path}": BOTH
        for path in (
            *("retrieve_futures", "copy_weights", "save_weights_external", "create_custom_loss"),
            *("sessions/search", "auth/token"),
        )
    },
}


@pytest.fixture
def catalog_url(tmp_path: Path) -> str:
    return sqlite_catalog(tmp_path)


@asynccontextmanager
async def served(base: BaseModel, catalog_url: str) -> AsyncIterator[httpx.AsyncClient]:
    made, access = fronted(base, catalog_url), access_of(catalog_url)
    app = create_app(made.front, access)
    paths = {f"{method} {route.path.removeprefix('/api/v1')}" for route in app.routes for method in route.methods}  # type: ignore[attr-defined]
    assert {path for path in paths if not path.startswith("HEAD")} == TABLE.keys(), "a new route needs a line"
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://test/api/v1") as http:
        yield http
    access.close()
    made.catalog.close()


async def ask(http: httpx.AsyncClient, route: str, headers: dict[str, str]) -> int:
    method, path = route.split(" ")
    for field in ("session_id", "model_id", "sampler_id", "folder", "name"):
        path = path.replace(f"{{{field}}}", "weights")
    fields = {} if method in ("GET", "DELETE") else {"json": {"session_id": "none"}}
    return (await http.request(method, path, headers=headers, **fields)).status_code  # type: ignore[arg-type]


async def test_each_scope_opens_its_routes_alone_by_a_key_as_the_sdk_writes_it(
    tiny_base: Callable[..., BaseModel], catalog_url: str
) -> None:
    catalog = Catalog(catalog_url)
    scopes = ("infer", "train", "publish", "promote", "tenant_admin")
    keys = {scope: catalog.keys.create(scope, scopes=[scope]).secret for scope in scopes}
    revoked = catalog.keys.create("revoked", scopes=["train"])
    catalog.keys.revoke(revoked.key.id)
    catalog.close()
    async with served(tiny_base(), catalog_url) as http:
        for route, allowed in TABLE.items():
            for scope, key in keys.items():
                status = await ask(http, route, {"X-API-Key": f"tml-{key}"})
                if allowed == OPEN or scope in allowed:
                    assert status not in (401, 403, 500), (route, scope)
                else:
                    assert status == 403, (route, scope)
            if allowed != OPEN:
                for wrong in ({}, {"X-API-Key": f"tml-{revoked.secret}"}, {"X-API-Key": f"tml-tml-{keys['train']}"}):
                    assert await ask(http, route, wrong) == 401, route
        for headers in ({"X-API-Key": keys["train"]}, {"Authorization": f"Bearer {keys['train']}"}):
            assert await ask(http, "GET /training_runs", headers) == 200
        assert await ask(http, "GET /training_runs", {"Authorization": f"Bearer tml-{keys['train']}"}) == 401


async def test_a_server_on_loopback_without_keys_takes_any(
    tiny_base: Callable[..., BaseModel], catalog_url: str
) -> None:
    async with served(tiny_base(), catalog_url) as http:
        assert await ask(http, "GET /training_runs", {"X-API-Key": "tml-anything"}) == 200
