"""A key that was stolen: it makes no others that outlive its revocation, and what it has begun ends with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from jobs.submission.server import RayJob
from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.catalog import identity as stored_keys
from loray.catalog.identity import SELF_ROTATION
from loray.errors import ConflictError, SpecError
from loray.recipes.load import load_recipe
from loray.schemas.access import KeyChange
from tests.fixtures.access import bearer
from tests.fixtures.api import Api, FakeJobs
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.gateway import ScriptedEngines, delta, gateway_app
from tests.fixtures.keys import access_of


class Asked:
    """One request to an application, whose answer the test reads while it goes on."""

    def __init__(self, app: FastAPI, method: str, path: str, key: str, body: Any = None) -> None:
        content = b"" if body is None else json.dumps(body).encode()
        headers = {"host": "test", "content-type": "application/json", "authorization": f"Bearer {key}"}
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        path, _, query = path.partition("?")
        scope = {"type": "http", "method": method, "path": path, "query_string": query.encode(), "headers": raw}
        self.text, self._changed, self._content = "", asyncio.Event(), [content]
        self.task = asyncio.ensure_future(app({**scope, "root_path": "", "scheme": "http"}, self._receive, self._send))

    async def said(self, text: str) -> None:
        while text not in self.text:
            self._changed.clear()
            await asyncio.wait_for(self._changed.wait(), 20)

    async def _receive(self) -> Any:
        if self._content:
            return {"type": "http.request", "body": self._content.pop(), "more_body": False}
        return await asyncio.Future[Any]()

    async def _send(self, message: Any) -> None:
        self.text += message.get("body", b"").decode()
        self._changed.set()


@pytest.fixture
def catalog(tmp_path: Path) -> Any:
    with closing(Catalog(sqlite_catalog(tmp_path))) as catalog:
        yield catalog


def test_rotating_itself_gives_a_thief_no_key_that_outlives_the_revocation(catalog: Catalog, tmp_path: Path) -> None:
    stolen = catalog.keys.create("ci", scopes=["infer"])
    with closing(Api(tmp_path, sqlite_catalog(tmp_path), access_of(sqlite_catalog(tmp_path), host="0.0.0.0"))) as api:

        def rotate(key_id: str, secret: str, **body: str) -> Any:
            return api.http.post(f"/keys/{key_id}/rotate", json=body, headers=bearer(secret))

        assert rotate(stolen.key.id, stolen.secret, grace_period="99999d").status_code == 422
        made = rotate(stolen.key.id, stolen.secret, grace_period="30d")
        assert made.status_code == 201, made.text
        again = rotate(made.json()["id"], made.json()["key"])
        assert (again.status_code, "less than a day ago" in again.text) == (409, True)
        assert rotate(stolen.key.id, stolen.secret).status_code == 409
        catalog.keys.revoke(stolen.key.id)
        for secret in (stolen.secret, made.json()["key"]):
            assert api.http.get("/keys/self", headers=bearer(secret)).status_code == 401


def test_the_keys_of_a_family_are_revoked_and_blocked_together(catalog: Catalog) -> None:
    first = catalog.keys.create("ci").key
    second = catalog.keys.rotate(first.id, grace=timedelta(days=1)).key
    other = catalog.keys.create("other").key
    catalog.keys.update(second.id, KeyChange(blocked=True))
    assert [catalog.keys.get(k.id).blocked for k in (first, second, other)] == [True, True, False]
    with pytest.raises(ConflictError, match="is blocked"):
        catalog.keys.rotate(second.id)
    catalog.keys.update(first.id, KeyChange(blocked=False))
    assert not catalog.keys.get(second.id).blocked
    catalog.keys.revoke(first.id, only_this=True)
    assert catalog.keys.get(second.id).revoked_at is None
    third = catalog.keys.rotate(second.id, grace=timedelta(days=1)).key
    catalog.keys.revoke(second.id)
    assert [catalog.keys.get(k.id).revoked_at is None for k in (first, second, third, other)] == [
        False,
        False,
        False,
        True,
    ]


def test_at_most_two_keys_of_a_family_go_on(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    first = catalog.keys.create("ci").key
    with pytest.raises(SpecError, match="30 days"):
        catalog.keys.rotate(first.id, grace=timedelta(days=31))
    second = catalog.keys.rotate(first.id, grace=timedelta(days=30)).key
    with pytest.raises(ConflictError, match=f"has been replaced by {second.id}"):
        catalog.keys.rotate(first.id)
    with pytest.raises(ConflictError, match="a third one may not"):
        catalog.keys.rotate(second.id, grace=timedelta(days=1))
    third = catalog.keys.rotate(second.id).key  # without a grace
    assert third.id.endswith("_3")
    own = catalog.view(third.principal(catalog.tenants.get("default")))
    with pytest.raises(ConflictError, match="less than a day ago"):
        own.keys.rotate(third.id)
    later = third.created_at + SELF_ROTATION
    monkeypatch.setattr(stored_keys, "now", lambda: later)
    assert own.keys.rotate(third.id).key.id.endswith("_4")


@pytest.mark.parametrize("how", ["revoked", "blocked", "tenant"])
def test_a_stream_ends_when_its_key_is_revoked(
    catalog: Catalog, tiny_base: Callable[..., BaseModel], tmp_path: Path, how: str
) -> None:
    catalog.tenants.create("acme")
    stolen = catalog.keys.create("ci", tenant="acme")
    other = catalog.keys.create("other")

    async def run() -> tuple[str, str, list[str]]:
        base, url = tiny_base(), sqlite_catalog(tmp_path)
        engines, access = ScriptedEngines([delta("ab")], hang=True), access_of(url, host="0.0.0.0")
        app = gateway_app(base, url, engines, access=access)
        body = {"model": base.name, "prompt": "a", "stream": True}
        async with app.router.lifespan_context(app):
            asked = [Asked(app, "POST", "/v1/completions", key.secret, body) for key in (stolen, other)]
            for one in asked:
                await one.said("ab")
            if how == "revoked":
                await asyncio.to_thread(catalog.keys.revoke, stolen.key.id)
            elif how == "blocked":
                await asyncio.to_thread(lambda: catalog.keys.update(stolen.key.id, KeyChange(blocked=True)))
            else:
                await asyncio.to_thread(lambda: catalog.tenants.update("acme", blocked=True))
            await access.refresh()
            await asyncio.wait_for(asked[0].task, 20)
            closed = list(engines.closed)
            assert not asked[1].task.done()
            asked[1].task.cancel()
            await asyncio.gather(asked[1].task, return_exceptions=True)
            return asked[0].text, asked[1].text, closed

    ended, others, closed = asyncio.run(run())
    assert '"code":"key_revoked"' in ended
    assert "key_revoked" not in others
    assert len(closed) == 1


class EndlessLog(FakeJobs):
    async def follow(self, job_id: str) -> AsyncIterator[str]:
        yield "first line\n"
        await asyncio.Event().wait()


def test_a_follower_of_a_log_ends_when_its_key_is_revoked(catalog: Catalog, tmp_path: Path) -> None:
    url = sqlite_catalog(tmp_path)
    stolen = catalog.keys.create("ci", scopes=["train"])
    catalog.jobs.add("job-1", name="tone", recipe=load_recipe("lora_smollm2").spec)

    async def run() -> str:
        access = access_of(url, host="0.0.0.0")
        api = Api(tmp_path, url, access)
        api.services._job_server = EndlessLog({"job-1": RayJob("RUNNING", "")})
        app = api.unmounted
        async with app.router.lifespan_context(app):
            asked = Asked(app, "GET", "/jobs/job-1/logs?follow=true", stolen.secret)
            await asked.said("first line")
            await asyncio.to_thread(catalog.keys.revoke, stolen.key.id)
            await access.refresh()
            await asyncio.wait_for(asked.task, 20)
            return asked.text

    assert asyncio.run(run()) == "first line\n"
