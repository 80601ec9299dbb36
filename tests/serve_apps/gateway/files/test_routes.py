"""Files over HTTP: OpenAI's client unmodified, forms of any order, limits, scopes, parts of a file."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.settings import Settings
from loray.spec import FleetSpec, Limits, ServeSpec
from serve_apps.gateway.app import open_gateway
from serve_apps.gateway.files import upload
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.gateway import ScriptedEngines, error_of, file_storage, gateway_app, openai_of
from tests.fixtures.keys import access_of

DATA = b'{"custom_id": "1"}\n' * 3


@pytest.fixture
def app(base: BaseModel, tmp_path: Path) -> FastAPI:
    url = sqlite_catalog(tmp_path)
    return gateway_app(base, url, ScriptedEngines(), files=file_storage(url, tmp_path))


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, headers={"Authorization": "Bearer -"}, raise_server_exceptions=False) as client:
        yield client


def form(*parts: tuple[str, bytes], boundary: str = "zz") -> dict[str, Any]:
    """A form with its parts in this order."""
    body = b""
    for name, value in parts:
        filename = '; filename="dir/a b.jsonl"' if name == "file" else ""
        body += f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"{filename}\r\n\r\n'.encode()
        body += value + b"\r\n"
    body += f"--{boundary}--\r\n".encode()
    return {"content": body, "headers": {"Content-Type": f"multipart/form-data; boundary={boundary}"}}


async def test_openai_client(app: FastAPI) -> None:
    async with openai_of(app) as client:
        after = {"anchor": "created_at", "seconds": 7200}
        file = await client.files.create(file=("batch.jsonl", DATA), purpose="batch", expires_after=after)
        assert file.id.startswith("file-")
        assert (file.object, file.bytes, file.filename, file.purpose, file.status) == (
            "file",
            len(DATA),
            "batch.jsonl",
            "batch",
            "processed",
        )
        assert file.expires_at - file.created_at == 7200
        assert await client.files.retrieve(file.id) == file
        assert (await client.files.content(file.id)).content == DATA
        others = [await client.files.create(file=(f"{i}", b"x"), purpose="fine-tune") for i in range(3)]
        listed = [one async for one in await client.files.list(limit=2)]  # the client asks for the pages that follow
        assert [one.id for one in listed] == [*(one.id for one in others[::-1]), file.id]
        assert [one.id async for one in await client.files.list(purpose="batch", order="asc")] == [file.id]
        deleted = await client.files.delete(file.id)
        assert (deleted.id, deleted.deleted, deleted.object) == (file.id, True, "file")
        for call in (client.files.retrieve, client.files.content, client.files.delete):
            with pytest.raises(openai.NotFoundError) as error:
                await call(file.id)
            assert error.value.code == "file_not_found"


@pytest.mark.parametrize("purpose_is_last", [False, True])
def test_fields_in_any_order(client: TestClient, purpose_is_last: bool) -> None:
    parts = [("purpose", b"batch"), ("file", DATA)]
    made = client.post("/v1/files", **form(*(parts[::-1] if purpose_is_last else parts))).json()
    assert made["filename"] == "a b.jsonl"
    content = client.get(f"/v1/files/{made['id']}/content")
    assert content.content == DATA
    assert content.headers["content-disposition"] == "attachment; filename*=UTF-8''a%20b.jsonl"


@pytest.mark.parametrize(
    ("parts", "param", "message"),
    [
        ([("file", b"x")], "purpose", "has no purpose"),
        ([("purpose", b"vision"), ("file", b"x")], "purpose", "send batch or fine-tune"),
        ([("purpose", b"batch_output"), ("file", b"x")], "purpose", "batches alone"),
        ([("purpose", b"batch")], "file", "has no file"),
        ([("purpose", b"batch"), ("file", b"")], "file", "empty"),
        ([("purpose", b"batch"), ("file", b"x"), ("file", b"y")], "file", "two files"),
        ([("purpose", b"batch"), ("purpose", b"batch"), ("file", b"y")], "purpose", "twice"),
        ([("purposes", b"batch"), ("file", b"x")], "purposes", "fields are"),
        ([("purpose", b"x" * 2000), ("file", b"x")], "purpose", "too long"),
        ([("purpose", b"batch"), ("expires_after[anchor]", b"now"), ("file", b"x")], "expires_after", "anchor"),
        ([("purpose", b"batch"), ("expires_after[seconds]", b"60"), ("file", b"x")], "expires_after", "3,600"),
    ],
)
def test_wrong_forms(client: TestClient, parts: Any, param: str, message: str) -> None:
    error = error_of(client.post("/v1/files", **form(*parts)), 400)
    assert error["param"] == param
    assert message in error["message"]
    assert client.get("/v1/files").json()["data"] == []


def test_what_is_no_form(client: TestClient) -> None:
    assert "multipart" in error_of(client.post("/v1/files", json={}), 400)["message"]
    broken = form(("purpose", b"batch"), ("file", DATA))
    cut = broken | {"content": broken["content"][:-9]}
    assert "no end" in error_of(client.post("/v1/files", **cut), 400)["message"]
    assert "cannot be read" in error_of(client.post("/v1/files", **broken | {"content": b"zz"}), 400)["message"]


def test_too_large(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "MAX_BYTES", {"batch": 10, "fine-tune": 30})
    for parts in ([("purpose", b"batch"), ("file", b"x" * 11)], [("file", b"x" * 11), ("purpose", b"batch")]):
        assert error_of(client.post("/v1/files", **form(*parts)), 413)["code"] == "request_too_large"
    assert client.post("/v1/files", **form(("file", b"x" * 11), ("purpose", b"fine-tune"))).status_code == 200


@pytest.mark.parametrize(
    ("range_", "status", "part"),
    [
        ("bytes=0-3", 206, slice(0, 4)),
        ("bytes=50-", 206, slice(50, None)),
        ("bytes=-5", 206, slice(-5, None)),
        ("bytes=5-10000", 206, slice(5, None)),
        ("bytes=0-1,3-4", 200, slice(None)),
        ("lines=1-2", 200, slice(None)),
    ],
)
def test_parts_of_a_file(client: TestClient, range_: str, status: int, part: slice) -> None:
    made = client.post("/v1/files", **form(("purpose", b"batch"), ("file", DATA))).json()
    answer = client.get(f"/v1/files/{made['id']}/content", headers={"Range": range_})
    assert answer.status_code == status
    assert answer.content == DATA[part]
    if status == 206:
        start, stop, _ = part.indices(len(DATA))
        assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/{len(DATA)}"
    missing = client.get(f"/v1/files/{made['id']}/content", headers={"Range": "bytes=1000-"})
    assert error_of(missing, 416)
    assert missing.headers["content-range"] == f"bytes */{len(DATA)}"


def test_scopes_tenants_and_limits(base: BaseModel, tmp_path: Path) -> None:
    url = sqlite_catalog(tmp_path)
    with closing(Catalog(url)) as catalog:
        for tenant in ("acme", "beta"):
            catalog.tenants.create(tenant)
        limits = Limits(max_stored_bytes=100)
        keys = {
            f"{tenant} {scope}": catalog.keys.create(scope, tenant=tenant, scopes={scope}, limits=limits).secret
            for tenant in ("acme", "beta")
            for scope in ("infer", "train", "publish")
        }
    app = gateway_app(base, url, ScriptedEngines(), access=access_of(url), files=file_storage(url, tmp_path))
    with TestClient(app, raise_server_exceptions=False) as client:

        def ask(who: str, method: str, path: str = "", **given: Any) -> httpx.Response:
            headers = {"Authorization": f"Bearer {keys[who]}"} | given.pop("headers", {})
            return client.request(method, f"/v1/files{path}", headers=headers, **given)

        batch, lessons = (form(("purpose", p), ("file", DATA)) for p in (b"batch", b"fine-tune"))
        assert ask("acme publish", "POST", **batch).status_code == 403
        assert "scope infer" in error_of(ask("acme train", "POST", **batch), 403)["message"]
        assert "scope train" in error_of(ask("acme infer", "POST", **lessons), 403)["message"]
        made = ask("acme infer", "POST", **batch).json()["id"]
        for who in ("acme train", "beta infer"):
            assert ask(who, "GET").json()["data"] == []
            for method, path in (("GET", made), ("GET", f"{made}/content"), ("DELETE", made)):
                assert error_of(ask(who, method, f"/{path}"), 404)["code"] == "file_not_found"
        assert [file["id"] for file in ask("acme infer", "GET").json()["data"]] == [made]
        assert "max_stored_bytes" in error_of(ask("acme infer", "POST", **batch), 403)["message"]


def test_memory_does_not_grow_with_the_file(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that is stored and the next one, and what comes with one message."""
    chunk, num_chunks = b"x" * (1 << 20), 48

    def body() -> Iterator[bytes]:
        yield b'--zz\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        yield b'--zz\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for _ in range(num_chunks):
            yield chunk
        yield b"\r\n--zz--\r\n"

    messages = [{"type": "http.request", "body": piece, "more_body": True} for piece in body()]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0)

    async def send(message: Any) -> None:
        sent.append(message)

    async def post() -> None:
        async with app.router.lifespan_context(app):
            headers = [(b"content-type", b"multipart/form-data; boundary=zz"), (b"authorization", b"Bearer -")]
            scope = {"type": "http", "method": "POST", "path": "/v1/files", "headers": headers, "query_string": b""}
            tracemalloc.start()
            await app(scope | {"root_path": "", "raw_path": b"", "http_version": "1.1"}, receive, send)

    try:
        asyncio.run(post())
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sent[0]["status"] == 200
    assert most < 20 << 20


def test_off(tiny_base: Callable[..., BaseModel], tmp_path: Path) -> None:
    base = tiny_base()
    env = {"LORAY_HOME": str(tmp_path), "LORAY_CATALOG": sqlite_catalog(tmp_path)}
    (tmp_path / "bases").symlink_to(base.path.parent)
    spec = FleetSpec.of(ServeSpec(base=base.name))
    for value, status in (("on", 200), ("off", 404)):
        app = open_gateway(spec, Settings.from_env(env | {"LORAY_FILES": value}), lambda _: ScriptedEngines())
        with TestClient(app, base_url="http://localhost") as client:
            assert client.get("/v1/files").status_code == status
