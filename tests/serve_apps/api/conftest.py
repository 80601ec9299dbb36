"""Fixtures that this folder's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve_apps.api.fakes import Api


@pytest.fixture
def api(tmp_path: Path, catalog_url: str) -> Iterator[Api]:
    api = Api(tmp_path / "home", catalog_url)
    yield api
    api.close()
