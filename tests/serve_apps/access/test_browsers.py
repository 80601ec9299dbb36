"""What a web page cannot make its visitor's browser do to a server on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import pytest

from loray.errors import LorayError, PermissionDenied
from loray.policy.auth import KeyRing
from loray.spec import OPERATOR
from serve_apps.auth import HEADERS, refuse_strangers
from tests.fixtures.catalogs import sqlite_catalog
from tests.serve_apps.keys import access_of

HOST = {"host": "localhost:8000"}
JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        ("GET", HOST),
        ("GET", {"host": "127.0.0.1:8000"}),
        ("GET", {"host": "127.8.9.10"}),
        ("GET", {"host": "[::1]:8000"}),
        ("GET", {"host": "LOCALHOST"}),
        ("GET", {"host": "ours:80"}),
        ("GET", {}),
        ("GET", HOST | {"origin": "http://evil.example"}),  # it cannot read the answer
        ("POST", HOST | JSON),
        ("POST", HOST | {"content-type": "application/yaml; charset=utf-8"}),
        ("POST", HOST | JSON | {"origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}),
        ("POST", HOST | {"authorization": "Bearer none"}),
        ("POST", HOST | {"content-type": "multipart/form-data; boundary=b", "idempotency-key": "k"}),
        ("PUT", HOST),
        ("DELETE", HOST),
    ],
)
def test_what_may_pass(method: str, headers: dict[str, str]) -> None:
    refuse_strangers(method, headers, frozenset({"ours"}))


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        *(("GET", {"host": host}) for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "", "[")),
        *(("GET", {"host": host}) for host in ("127.0.0.1@evil.example", "evil.example@127.0.0.1", "10.0.0.1")),
        *(("POST", HOST | JSON | {"origin": o}) for o in ("null", "http://evil.example", "http://localhost:3000", "x")),
        ("POST", HOST | JSON | {"sec-fetch-site": "cross-site"}),
        ("DELETE", HOST | {"origin": "http://evil.example"}),
        ("POST", HOST),  # rollback and stop need no body
        *(
            ("POST", HOST | {"content-type": kind})
            for kind in ("text/plain", "Text/Plain;charset=UTF-8", "application/x-www-form-urlencoded")
        ),
        ("POST", HOST | {"content-type": "multipart/form-data; boundary=b"}),
    ],
)
def test_what_is_refused(method: str, headers: dict[str, str]) -> None:
    with pytest.raises(PermissionDenied):
        refuse_strangers(method, headers, frozenset({"ours"}))


class Read(Mapping[str, str]):
    """Headers, with the names of those that were read."""

    def __init__(self, headers: dict[str, str]) -> None:
        self._headers = headers
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.names.add(name)
        return self._headers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)


@pytest.mark.parametrize("headers", [{}, HOST, HOST | JSON, {"authorization": "Bearer x"}, {"x-tenant-id": "acme"}])
@pytest.mark.parametrize("ring", [KeyRing(), KeyRing(static={b"0" * 32: OPERATOR})])
def test_the_middleware_keeps_what_is_read(headers: dict[str, str], ring: KeyRing, tmp_path: Path) -> None:
    given = Read(headers)
    access = access_of(sqlite_catalog(tmp_path), ring=ring)

    async def ask() -> None:
        for method in ("GET", "POST"):
            with suppress(LorayError):
                await access.admit(method, "infer", given)

    asyncio.run(ask())
    access.close()
    assert given.names
    assert given.names <= HEADERS
