"""Fixtures that this folder's tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loray.bases.registry import BaseModel
from loray.catalog import AdapterVersion
from loray.cli.main import _run
from loray.client import CatalogClient
from loray.publishing import Destination, import_folder
from tests.cli.run import Loray, Result
from tests.fixtures.api import Api, listening
from tests.fixtures.catalogs import sqlite_catalog


@pytest.fixture
def catalog_url(tmp_path: Path) -> str:
    """On SQLite: tests/catalog has each statement on both kinds of database. Routes of adapters are asked on both."""
    return sqlite_catalog(tmp_path / "home")


@pytest.fixture
def api(tmp_path: Path, catalog_url: str) -> Iterator[Api]:
    api = Api(tmp_path / "home", catalog_url)
    yield api
    api.close()


@pytest.fixture
def client(api: Api) -> CatalogClient:
    return CatalogClient("http://test", transport=api.transport)


@pytest.fixture
def base(api: Api, tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return api.add_base(tiny_base())


@pytest.fixture
def tone(api: Api, base: BaseModel, peft_folder: Callable[..., Path]) -> AdapterVersion:
    """A version that is in the catalog and in the store."""
    return import_folder(peft_folder(base), base, Destination("tone", api.services.store, api.catalog))


@pytest.fixture
def url(api: Api) -> Iterator[str]:
    with listening(api.app) as url:
        yield url


@pytest.fixture
def loray(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Loray:
    """The command line with LORAY_URL, and neither store nor catalog."""
    monkeypatch.setenv("LORAY_HOME", str(tmp_path / "nothing-here"))
    monkeypatch.setenv("LORAY_CATALOG", "postgresql://nobody@127.0.0.1:1/nothing")
    monkeypatch.setenv("LORAY_URL", url)

    def run(*args: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["loray", *map(str, args)])
        capsys.readouterr()  # what fixtures have printed
        code = _run()
        return Result(code, *capsys.readouterr())

    return run
