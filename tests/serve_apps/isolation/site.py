"""Both applications on one catalog with two tenants and keys of every kind."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from fastapi.routing import APIRoute
from fastapi.testclient import TestClient
from starlette.routing import Route as PlainRoute

from jobs.submission.server import RayJob
from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.catalog.database import writing
from loray.catalog.schema import batches, files, keys
from loray.publishing.uploads import Uploads
from loray.publishing.user_files import FileWriter
from loray.recipes.load import load_recipe
from loray.schemas.status import AdapterPlacement
from loray.spec import Principal, Projection
from serve_apps.gateway.fine_tuning.jobs import FineTuning
from tests.fixtures.api import Api
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.gateway import REPLICA, ScriptedEngines, delta, file_storage, gateway_app
from tests.fixtures.training_sessions import begin_session
from tests.fixtures.versions import manifest
from tests.serve_apps.isolation.table import API, GATEWAY, Route, Thing

SCOPES = ("infer", "publish", "promote", "train", "tenant_admin")
_UPLOAD = hashlib.sha256(b"uploads/acme\0zq").hexdigest()[:32]  # as `Uploads.begin` makes it of a key
SECRET = Thing(
    *("acme", "vault-9", "hush", "c0ffee" * 10 + "beef", "job-zq7", "key-zq7", _UPLOAD, "file-zq7", "batch-zq7"),
    "session-zq7",
)
# Words of acme that no request has.
UNSAID = ("zq-words", "zq-alias", "zq-data", "zq-stage", "5a5a5a5a")
_PAIR = Projection(key=77, rank=8, max_in=8, max_out=8, sha256="5a" * 32)


@dataclass
class Application:
    app: FastAPI
    client: TestClient
    table: dict[str, Route]

    def routes(self) -> set[str]:
        """All that it answers, in its OpenAPI document or not."""
        found: set[str] = set()
        routes = list(self.app.routes)
        while routes:
            route = routes.pop()
            if (included := getattr(route, "original_router", None)) is not None:
                routes += included.routes
                continue
            assert isinstance(route, APIRoute | PlainRoute), f"{route} is of a kind that this test does not walk"
            found |= {f"{method} {route.path}" for method in route.methods or () if method != "HEAD"}
        return found

    def ask(self, name: str, thing: Thing, key: str | None) -> httpx.Response:
        route, (method, path) = self.table[name], name.split(" ")
        words = {"name": thing.name, "alias": thing.alias, "version": 1, "id": thing.job, "key": "zq-tag"}
        words |= {"model": thing.model, "file_id": thing.file, "batch_id": thing.batch, "checkpoint": thing.model}
        if "/keys/" in path:
            words["id"] = thing.key
        if "/console/files" in path or "/console/batches" in path:
            words["id"] = thing.file if "files" in path else thing.batch
        if "/console/sessions" in path:
            words["id"] = thing.session
        if "/uploads" in path:
            words |= {"name": "adapter_config.json", "id": thing.upload}
        if "/static/" in path:
            words["name"] = "console.css" if "/console" in path else "swagger.js"
        path = path.replace(":path", "").format(**words)
        headers = {"Content-Type": "application/json"} | ({} if key is None else {"Authorization": f"Bearer {key}"})
        options: dict[str, Any] = {
            "params": route.params(thing),
            "headers": headers,
            "follow_redirects": False,
            **route.fields(thing),
        }
        return self.client.request(method, path.lstrip("/") if self.table is API else path, **options)


@dataclass
class Site:
    """`keys`: `tenant scope` → key; also `expired`, `revoked`, `admin`, and `beta`, which has every scope of SCOPES."""

    gateway: Application
    api: Application
    catalog: Catalog
    keys: dict[str, str]
    engines: ScriptedEngines
    fakes: Api

    @property
    def applications(self) -> tuple[Application, Application]:
        return self.gateway, self.api


@contextmanager
def site(base: BaseModel, home: Path) -> Iterator[Site]:
    url = sqlite_catalog(home)
    fakes = Api(home, url)
    engines = ScriptedEngines([delta("ok", "stop")])
    engines.replicas = [REPLICA.model_copy(update={"adapters_in_pool": (SECRET.digest,)})]
    catalog = Catalog(url)
    keys = _fill(catalog, base, fakes)
    tuning = FineTuning(fakes.jobs, fakes.settings)
    gateway = gateway_app(base, url, engines, files=file_storage(url, home), tuning=tuning)
    prefix = {"base_url": "http://test/api/v1/", "root_path": "/api/v1"}
    with (
        TestClient(gateway, base_url="http://test", raise_server_exceptions=False) as front,
        TestClient(fakes.unmounted, **prefix, raise_server_exceptions=False) as back,  # type: ignore[arg-type]
    ):
        yield Site(
            Application(gateway, front, GATEWAY), Application(fakes.unmounted, back, API), catalog, keys, engines, fakes
        )
    catalog.close()


def _fill(catalog: Catalog, base: BaseModel, fakes: Api) -> dict[str, str]:
    for tenant in ("acme", "beta"):
        catalog.tenants.create(tenant)
    catalog.bases.add(base.name, base.fingerprint)
    recipe = load_recipe("lora_smollm2").spec
    recipe = recipe.model_copy(
        update={"name": SECRET.name, "data": recipe.data.model_copy(update={"train": "zq-data"})}
    )
    acme = catalog.view(Principal(tenant="acme", scopes=frozenset(SCOPES), actor="ann"))
    described = manifest().model_copy(
        update={
            "base": base.name,
            "base_fingerprint": base.fingerprint,
            "description": "zq-words",
            "projection": _PAIR,
            "recipe": recipe,
            "job_id": SECRET.job,
        }
    )
    acme.adapters.record_upload(SECRET.digest)
    acme.adapters.register(SECRET.name, SECRET.digest, described, [SECRET.alias])
    acme.tags.set(SECRET.name, "zq-tag", "zq-stage")
    assert Uploads(fakes.services.store, "acme").begin("zq") == SECRET.upload
    writer = FileWriter(acme, fakes.services.store.objects)
    writer.write(b"zq-words")
    acme.batches.create(writer.finish("zq-data", "batch").id, "/v1/completions", metadata={"of": "zq-words"})
    begin_session(acme, SECRET.session, display_name="zq-words")
    acme.jobs.add(SECRET.job, name=SECRET.name, recipe=recipe)
    fakes.jobs.jobs[SECRET.job] = RayJob("RUNNING", "zq-words")
    fakes.placements.found = [
        AdapterPlacement(
            replica="r1",
            node="n",
            digest=SECRET.digest,
            name=SECRET.model,
            version=1,
            nbytes=4,
            num_tokens=1,
            tier="pool",
            uses=412,
            last_used_at=1.0,
        )
    ]
    past = datetime.now(UTC) - timedelta(hours=1)
    made = {
        f"acme {scope}": catalog.keys.create(f"acme {scope}", tenant="acme", scopes=frozenset({scope}))
        for scope in SCOPES
    }
    made["acme secret"] = catalog.keys.create("zq-alias", tenant="acme", metadata={"team": "zq-words"})
    with writing(catalog._db.engine) as c:  # so that the table knows its id
        c.execute(keys.update().where(keys.c.id == made["acme secret"].key.id).values(id=SECRET.key))
        c.execute(files.update().values(id=SECRET.file))
        c.execute(batches.update().values(id=SECRET.batch, input_file_id=SECRET.file))
    made["narrow"] = catalog.keys.create("narrow", tenant="acme", scopes=SCOPES, models=["other"])
    for scope in SCOPES:
        made[f"beta {scope}"] = catalog.keys.create(f"beta {scope}", tenant="beta", scopes={scope})
    made["publisher"] = catalog.keys.create("publisher", scopes=["publish"])
    made["beta"] = catalog.keys.create("beta", tenant="beta", scopes=frozenset(SCOPES))
    made["admin"] = catalog.keys.create("admin", tenant="default", scopes=frozenset({"admin"}))
    made["revoked"] = catalog.keys.create("revoked", tenant="acme", scopes=frozenset({*SCOPES, "admin"}))
    catalog.keys.revoke(made["revoked"].key.id)
    made["expired"] = catalog.keys.create("expired", tenant="acme", scopes=frozenset({"admin"}), expires_at=past)
    return {name: key.secret for name, key in made.items()}
