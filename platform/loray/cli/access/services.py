"""What `loray keys` and `loray tenants` ask: the server at LORAY_URL, or the catalog."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from loray.cli.services import open_catalog
from loray.client import CatalogClient
from loray.client.access import AccessCalls
from loray.client.direct import DirectAccess

Access = AccessCalls | DirectAccess


@contextmanager
def open_access() -> Iterator[Access]:
    with open_catalog() as catalog:
        yield catalog if isinstance(catalog, CatalogClient) else DirectAccess(catalog)
