"""Deletion, restoration and release over HTTP, with the typed client."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from loray.client import CatalogClient
from loray.errors import AdapterNotFound, ConflictError, NotFoundError
from tests.fixtures.versions import digest, publish
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


def test_a_version_in_quarantine_says_so_and_is_released(api: Api, client: CatalogClient) -> None:
    publish(api.catalog, "tone", 1, 2)
    at = datetime(2026, 1, 1, tzinfo=UTC)
    api.catalog.report_death(digest(2), "r1", at, lambda deaths: timedelta(minutes=deaths))
    assert [v.quarantine and v.quarantine.deaths for v in client.versions("tone")] == [1, None]
    shown = client.version("tone", 2).quarantine
    assert shown is not None
    assert (shown.died_at, shown.refused_until) == (at, at + timedelta(minutes=1))
    client.release("tone", 2)
    assert client.version("tone", 2).quarantine is None
    with pytest.raises(NotFoundError, match="tone@2 is not in quarantine"):
        client.release("tone", 2)
