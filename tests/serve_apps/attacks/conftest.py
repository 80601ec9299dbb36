"""Fixtures that this folder's tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from loray.bases.registry import BaseModel
from tests.fixtures.api import Api, _loop
from tests.fixtures.catalogs import sqlite_catalog


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Api]:
    _loop()  # made by one thread
    with closing(Api(tmp_path / "home", sqlite_catalog(tmp_path))) as api:
        yield api


@pytest.fixture
def base(api: Api, tiny_base: Callable[..., BaseModel]) -> BaseModel:
    return api.add_base(tiny_base())
