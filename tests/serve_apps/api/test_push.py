"""The command line at a server: neither database nor store of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loray.bases.registry import BaseModel
from tests.cli.run import Loray
from tests.fixtures.catalogs import sqlite_catalog
from tests.serve_apps.api.fakes import Api


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    api = Api(tmp_path / "server", sqlite_catalog(tmp_path / "server"))
    yield api
    api.close()


def test_a_data_scientists_day(
    loray: Loray, api: Api, tiny_base: Callable[..., BaseModel], peft_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_base()
    shutil.copytree(base.path, api.settings.home / "bases" / base.name)
    assert "no adapters yet" in loray("adapters", "ls").out  # after what making the base has printed
    for seed in (0, 1):
        pushed = loray("adapters", "push", peft_folder(base, seed=seed), "--name", "tone", "--base", base.name)
        assert pushed == (0, f"published tone@{seed + 1}\n", "")
    assert loray("adapters", "promote", "tone@1").out == "tone@prod is version 1 now\n"
    assert loray("adapters", "promote", "tone", "--expected", "2").code == 1
    assert loray("adapters", "promote", "tone", "--expected", "1").out == "tone@prod is version 2 now\n"
    assert loray("adapters", "rollback", "tone").out == "tone@prod is version 1 again\n"
    (row,) = json.loads(loray("adapters", "ls", "--json").out)
    assert (row["name"], row["version"], row["aliases"]) == ("tone", 1, {"prod": 1})
    assert "prod→1" in loray("adapters", "ls").out
    got = tmp_path / "got"
    assert loray("adapters", "pull", "tone@prod", got).out == f"downloaded tone@1 to {got}\n"
    assert (got / "adapter_model.safetensors").is_file()
    assert loray("adapters", "push", got, "--name", "copy", "--json").code == 0
    assert loray("adapters", "push", got, "--name", "copy").out == "published copy@1\n"
    assert loray("adapters", "rm", "tone@1", "--yes").code == 1
    assert loray("adapters", "rm", "tone@2", "--yes").code == 0
    assert loray("adapters", "restore", "tone@2").out == "restored tone@2\n"
    assert loray("adapters", "rm", "tone", "--yes").code == 0
    assert [row["name"] for row in json.loads(loray("adapters", "ls", "--json").out)] == ["copy"]


def test_without_a_server(loray: Loray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = loray("adapters", "push", tmp_path / "missing", "--name", "tone")
    assert (refused.code, "is not a folder" in refused.err) == (1, True)
    monkeypatch.setenv("LORAY_URL", "localhost:8000")
    assert "must begin with http://" in loray("adapters", "ls").err
    monkeypatch.delenv("LORAY_URL")
    assert "set LORAY_URL" in loray("adapters", "push", tmp_path, "--name", "tone").err
