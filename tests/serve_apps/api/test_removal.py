"""Deletion and restoration over HTTP, with the typed client."""

from __future__ import annotations

from pathlib import Path

import pytest

from loray.client import CatalogClient
from loray.errors import AdapterNotFound, ConflictError
from tests.catalog.test_catalog import digest, publish
from tests.serve_apps.api.fakes import Api


@pytest.fixture
def client(api: Api) -> CatalogClient:
    return CatalogClient("http://test", transport=api.transport)


def test_versions_and_names_go_and_come_back(api: Api, client: CatalogClient, tmp_path: Path) -> None:
    digests = [api.store(number, tmp_path) for number in (1, 2)]
    for adapter in digests:
        client.register("tone", adapter)
    client.promote("tone", "prod", 2)
    with pytest.raises(ConflictError, match="prod points at"):
        client.delete("tone", 2)
    client.delete("tone", 1)
    assert client.adapter("tone").versions == (2,)
    client.restore("tone", 1)
    client.delete("tone")
    for ask in (client.adapter, client.delete, client.aliases):
        with pytest.raises(AdapterNotFound):
            ask("tone")
    with pytest.raises(ConflictError, match="was deleted"):
        client.register("tone", digests[0])
    client.restore("tone")
    assert (client.adapter("tone").versions, client.adapter("tone").aliases) == ((2, 1), {"prod": 2})


def test_what_the_store_lacks_cannot_be_restored(api: Api, client: CatalogClient) -> None:
    publish(api.catalog, "tone", 1)
    client.delete("tone")
    with pytest.raises(ConflictError, match=f"the bytes of adapter {digest(1)[:12]} are gone; publish it again"):
        client.restore("tone")
