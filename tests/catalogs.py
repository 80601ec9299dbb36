"""New catalogs for tests. One is migrated a session on each kind of database; the others are its copies."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from loray.catalog.database import open_database

if TYPE_CHECKING:
    from tests.postgres import Postgres

_TEMPLATE = "migrated"


def sqlite_catalog(folder: Path) -> str:
    """URL of the catalog `catalog.db` in the folder. Both are made if they are not there."""
    file = folder / "catalog.db"
    if not file.exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(_migrated_file(), file)
    return f"sqlite:///{file}"


def new_postgresql(server: Postgres) -> str:
    """URL of a new catalog on the server."""
    if not server.has_database(_TEMPLATE):
        server.execute("postgres", f"CREATE DATABASE {_TEMPLATE}")
        open_database(server.url(_TEMPLATE)).dispose()
    return server.new_database(template=_TEMPLATE)


@pytest.fixture(params=["sqlite", "postgresql"])
def catalog_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """URL of a new catalog, on each kind of database."""
    if request.param == "sqlite":
        return sqlite_catalog(tmp_path / "home")
    return new_postgresql(request.getfixturevalue("postgres"))


@functools.cache
def _migrated_file() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="loray-catalog-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    file = folder / "catalog.db"
    open_database(f"sqlite:///{file}").dispose()
    return file
