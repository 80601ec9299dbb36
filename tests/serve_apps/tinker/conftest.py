"""A front of Tinker's protocol without Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.tinker import Unigram
from tests.serve_apps.tinker.asking import fronted


@pytest.fixture
def front(tiny_base: Callable[..., BaseModel], tmp_path: Path) -> Iterator[Unigram]:
    """A front on a new catalog, in which the tenants acme and globex are."""
    url = sqlite_catalog(tmp_path)
    catalog = Catalog(url)
    for tenant in ("acme", "globex"):
        catalog.tenants.create(tenant)
    catalog.close()
    made = fronted(tiny_base(), url)
    yield made
    made.catalog.close()
