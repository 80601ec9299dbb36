"""Fixtures that this folder's tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fixtures.catalogs import sqlite_catalog
from tests.serve_apps.console.site import ConsoleSite


@pytest.fixture
def console(tmp_path: Path) -> Iterator[ConsoleSite]:
    """On loopback, where no key is needed until one is made."""
    site = ConsoleSite(tmp_path / "home", sqlite_catalog(tmp_path))
    yield site
    site.close()
