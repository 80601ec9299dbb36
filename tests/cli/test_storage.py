"""`loray store`, `loray adapters rm` and `restore`, with a real folder."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from loray.bases.registry import BaseModel
from tests.cli.run import Loray
from tests.fixtures.stores import damage


def test_a_deleted_version_is_restored_or_collected(
    loray: Loray, base: BaseModel, peft_folder: Callable[..., Path], home: Path
) -> None:
    for seed in (0, 1):
        assert loray("adapters", "import", peft_folder(base, seed=seed), "--name", "tone").code == 0
    assert "nobody" not in loray("adapters", "rm", "tone@1", "--yes").out
    assert loray("adapters", "show", "tone@1").code == 1
    assert loray("adapters", "restore", "tone@1").out == "restored tone@1\n"
    assert loray("adapters", "rm", "tone@prod", "--yes").code == 2
    assert loray("adapters", "rm", "tone", "--yes").code == 0
    stats = loray("store", "stats", "--json").json
    assert (stats["versions"][0]["num_versions"], stats["versions"][0]["num_deleted"]) == (2, 2)
    assert stats["objects"]["manifests"]["objects"] == 2
    assert "TENANT" in loray("store", "stats").out
    assert loray("store", "gc", "--grace", "soon").code == 2
    assert loray("store", "gc").out == "deleted 0 objects, 0 B\n"
    blob = home / "store" / "blobs" / "ab" / ("ab" * 32)
    blob.parent.mkdir(exist_ok=True)
    blob.write_bytes(b"left behind")
    os.utime(blob, (0, 0))
    assert "1 objects, 11 B would be deleted; --yes deletes them" in loray("store", "gc").out
    assert blob.exists()
    assert loray("store", "gc", "--yes", "--json").json["objects"] == [f"blobs/ab/{'ab' * 32}"]
    assert not blob.exists()
    assert loray("store", "verify").out == "the store is whole\n"
    assert loray("adapters", "restore", "tone", "--json").json == {"restored": "tone"}
    damage(next((home / "store" / "blobs").rglob("*/*")))
    assert "differs from its SHA-256; needed by " in loray("store", "verify").failed


def test_a_backup_is_restored_into_an_empty_catalog(
    loray: Loray, base: BaseModel, peft_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for seed in (0, 1):
        loray("adapters", "import", peft_folder(base, seed=seed), "--name", "tone", "--alias", "prod")
    file = tmp_path / "backup"
    assert loray("catalog", "backup", file).out.startswith("backed up 1 names and 2 versions, as of ")
    verified = loray("catalog", "verify").out.splitlines()
    assert verified[0].endswith(" entries are as they were written")
    refused = loray("catalog", "restore", file)
    assert (refused.code, "the catalog is not empty" in refused.err) == (1, True)
    monkeypatch.setenv("LORAY_CATALOG", f"sqlite:///{tmp_path}/other.db")
    assert loray("catalog", "restore", file, "--json").json["versions"] == 2
    assert "prod→2" in loray("adapters", "ls").out
    state = loray("catalog", "verify", "--known", verified[-1], "--json").json
    assert state["num_entries"] > 0
    assert loray("catalog", "verify", "--known", "1:" + "0" * 64).code == 1
    assert loray("catalog", "verify", "--known", "wrong").code == 2
    assert loray("store", "verify").out == "the store is whole\n"
