"""Bytes of files: parts in the store, read from any place, and removed."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from loray.catalog import Catalog
from loray.errors import DataError, IntegrityError, UserFileNotFound
from loray.publishing import user_files
from loray.publishing.user_files import FileWriter, read_file, read_lines, remove_unneeded
from loray.store.objects import LocalStore
from tests.fixtures.catalogs import sqlite_catalog


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog(sqlite_catalog(tmp_path))


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "store")


def test_parts(catalog: Catalog, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_files, "PART_BYTES", 100)
    monkeypatch.setattr(user_files, "_READ_BYTES", 30)
    data = bytes(range(256)) * 2
    with FileWriter(catalog, store) as writer:
        for start in range(0, len(data), 70):
            writer.write(data[start : start + 70])
        file = writer.finish("x", "batch")
    assert file.bytes == len(data)
    assert file.sha256 == hashlib.sha256(data).hexdigest()
    sizes = [store.size(key) for key in store.list(f"files/default/{file.id}/")]
    assert sizes == [100] * 5 + [12]
    for start, stop in ((0, None), (0, 1), (99, 101), (95, 310), (500, 900), (512, None)):
        assert b"".join(read_file(store, file, start, stop)) == data[start:stop]
    assert max(map(len, read_file(store, file))) <= 30
    store.delete(f"files/default/{file.id}/00003")
    with pytest.raises(IntegrityError, match="upload it again"):
        list(read_file(store, file))


def test_lines(catalog: Catalog, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_files, "_READ_BYTES", 4)
    lines = [b"one", b"", b"a longer line", b"last"]
    with FileWriter(catalog, store) as writer:
        writer.write(b"\n".join(lines))
        file = writer.finish("x", "batch")
    assert list(read_lines(store, file)) == lines
    monkeypatch.setattr(user_files, "MAX_LINE_BYTES", 8)
    with pytest.raises(DataError, match="line 3 is longer"):
        list(read_lines(store, file))


def test_what_was_begun_or_deleted_goes(catalog: Catalog, store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(user_files, "PART_BYTES", 10)
    with FileWriter(catalog, store) as writer:
        writer.write(b"x" * 25)
    with FileWriter(catalog, store) as writer:
        writer.write(b"y" * 25)
        kept = writer.finish("y", "batch")
    assert len(list(store.list("files/"))) == 5
    assert remove_unneeded(catalog, store) == 1
    assert {key.split("/")[2] for key in store.list("files/")} == {kept.id}
    catalog.files.delete(kept.id)
    with pytest.raises(UserFileNotFound):
        catalog.files.get(kept.id)
    assert remove_unneeded(catalog, store) == 1
    assert not list(store.list("files/"))
