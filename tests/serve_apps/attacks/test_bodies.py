"""Bodies that would fill the memory of the catalog's API: no route reads more than its limit, whatever names it."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.types import Message

from serve_apps.api.problems import MAX_BODY_BYTES
from tests.fixtures.catalogs import sqlite_catalog
from tests.serve_apps.api.fakes import Api

CHUNK = 64 << 10  # what uvicorn passes on at once
MANY = 64 * CHUNK
UPLOAD = "0" * 32


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    api = Api(tmp_path / "home", sqlite_catalog(tmp_path))
    yield api
    api.close()


def send(api: Api, method: str, path: str, *headers: tuple[bytes, bytes]) -> tuple[int, int]:
    """Status of the answer to a body of `MANY` bytes, and how many of them were read."""
    read, statuses = 0, []

    async def receive() -> Message:
        nonlocal read
        read += CHUNK
        return {"type": "http.request", "body": b" " * CHUNK, "more_body": read < MANY}

    async def answered(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    given = [(b"host", b"test"), (b"content-type", b"application/json"), (b"if-match", b"*"), *headers]
    scope = {
        "type": "http",
        "method": method,
        "path": f"/api/v1{path}",
        "raw_path": f"/api/v1{path}".encode(),
        "query_string": b"",
        "headers": given,
        "client": ("127.0.0.1", 1),
        "server": ("test", 80),
        "scheme": "http",
        "http_version": "1.1",
    }
    asyncio.run(api.app(scope, receive, answered))
    return statuses[0], read


@pytest.mark.parametrize("name", ["uploads", "files"])
@pytest.mark.parametrize("has_length", [True, False])
def test_no_route_reads_more_than_its_limit(api: Api, name: str, has_length: bool) -> None:
    """Names of adapters, tags and aliases are the caller's choice, and so is how the body's length is told."""
    headers = [(b"content-length", b"300000")] if has_length else [(b"transfer-encoding", b"chunked")]
    paths = api.http.get("/openapi.json").json()["paths"]
    with_bodies = 0
    for template, operations in paths.items():
        path = re.sub(r"\{\w+\}", name, template)
        for method in operations.keys() & {"get", "put", "post", "patch", "delete"}:
            if (method, template) == ("put", "/uploads/{id}/files/{name}"):
                continue
            status, read = send(api, method.upper(), path, *headers)
            assert read <= (0 if has_length else MAX_BODY_BYTES + CHUNK), (method, path)
            if "requestBody" in operations[method]:
                with_bodies += 1
                assert status == 413, (method, path)
    assert with_bodies > 10


@pytest.mark.parametrize("pages", ["", "/console"])
@pytest.mark.parametrize(("length", "status"), [(None, 411), (b"4294967296", 413)])
def test_a_file_is_limited_by_its_name(api: Api, pages: str, length: bytes | None, status: int) -> None:
    """Its route writes it to disk. It says how long it is, and 4 GiB are too much for this one."""
    upload = api.http.post("/uploads").json()["id"]
    headers = [(b"x-csrf-token", csrf(api)), *([] if length is None else [(b"content-length", length)])]
    assert send(api, "PUT", f"{pages}/uploads/{upload}/files/README.md", *headers) == (status, 0)


def csrf(api: Api) -> bytes:
    found = re.search('"X-CSRF-Token": "([^"]+)"', api.http.get("/console/uploads").text)
    assert found is not None
    return found[1].encode()
