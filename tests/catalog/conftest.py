"""Fixtures that this folder's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from loray.catalog import Catalog


@pytest.fixture
def url(catalog_url: str) -> str:
    return catalog_url


@pytest.fixture
def catalog(url: str) -> Iterator[Catalog]:
    catalog = Catalog(url)
    yield catalog
    catalog.close()
