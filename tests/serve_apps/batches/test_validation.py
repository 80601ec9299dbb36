"""The input of a batch: each mistake has its code and line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from loray.catalog import Catalog
from loray.catalog.files import UserFile
from loray.publishing.user_files import FileWriter
from loray.store.objects import LocalStore
from serve_apps.batches import validation
from serve_apps.batches.validation import Line, check_input, lines_of
from tests.fixtures.catalogs import sqlite_catalog

ENDPOINT = "/v1/chat/completions"


def line(custom_id: Any = "1", **fields: Any) -> str:
    given = {"custom_id": custom_id, "method": "POST", "url": ENDPOINT, "body": {"model": "a", "messages": []}}
    return json.dumps(given | fields)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(sqlite_catalog(tmp_path))


def write(catalog: Catalog, store: LocalStore, text: str) -> UserFile:
    with FileWriter(catalog, store) as writer:
        writer.write(text.encode())
        return writer.finish("a", "batch")


def test_valid_lines(catalog: Catalog, store: LocalStore) -> None:
    file = write(catalog, store, f"{line('a')}\n\n{line('b', body={'model': 'é', 'n': 1})}\n")
    assert check_input(store, file, ENDPOINT) == (2, [])
    assert list(lines_of(store, file)) == [
        Line(1, "a", "a", b'{"model":"a","messages":[]}'),
        Line(3, "b", "é", '{"model":"é","n":1}'.encode()),
    ]


@pytest.mark.parametrize(
    ("text", "code", "param"),
    [
        ("{", "invalid_json_line", None),
        ("[]", "invalid_json_line", None),
        ('{"a": NaN}', "invalid_json_line", None),
        (line(7), "invalid_custom_id", "custom_id"),
        (line(""), "invalid_custom_id", "custom_id"),
        (line("x" * 513), "invalid_custom_id", "custom_id"),
        (line(method="GET"), "invalid_method", "method"),
        (line(url="/v1/completions"), "mismatched_url", "url"),
        (line(body="x"), "invalid_body", "body"),
        (line(body={"model": 7}), "invalid_body", "body.model"),
        (line(body={"stream": True}), "stream_not_allowed", "body.stream"),
        (line("before"), "duplicate_custom_id", "custom_id"),
    ],
)
def test_wrong_lines(catalog: Catalog, store: LocalStore, text: str, code: str, param: str | None) -> None:
    file = write(catalog, store, f"{line('before')}\n{text}\n{line('after')}")
    total, (error,) = check_input(store, file, ENDPOINT)
    assert (total, error.code, error.line, error.param) == (3, code, 2, param)


def test_as_a_whole(catalog: Catalog, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_input(store, write(catalog, store, "\n \n"), ENDPOINT)[1][0].code == "empty_file"
    many = write(catalog, store, "x\n" * 150)
    assert len(check_input(store, many, ENDPOINT)[1]) == 100
    monkeypatch.setattr(validation, "MAX_LINES", 2)
    three = write(catalog, store, "\n".join(line(str(i)) for i in range(3)))
    assert [error.code for error in check_input(store, three, ENDPOINT)[1]] == ["too_many_requests"]
