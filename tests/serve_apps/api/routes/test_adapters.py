"""Adapters and their versions over HTTP, with the typed client, on both databases."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from loray.client import CatalogClient
from loray.errors import ConflictError, NotFoundError
from loray.schemas.status import AdapterPlacement
from tests.fixtures.api import Api, problem
from tests.fixtures.catalogs import catalog_url  # noqa: F401, of both kinds, where this folder has SQLite's alone
from tests.fixtures.versions import BASE, digest, publish

# -- reading ----------------------------------------------------------------------------------------------------------


def test_pages_of_adapters(api: Api) -> None:
    api.catalog.bases.add("smollm2", BASE)
    for i in range(3):
        publish(api.catalog, f"adapter-{i}", 1)
    first = api.http.get("/adapters", params={"limit": 2, "base": "smollm2"})
    following = first.links["next"]["url"]
    assert following == f"/api/v1/adapters?limit=2&base=smollm2&cursor={first.json()['next']}"
    second = api.http.get(f"http://test{following}")
    assert [item["name"] for page in (first, second) for item in page.json()["items"]] == [
        f"adapter-{i}" for i in range(3)
    ]
    assert (second.json()["next"], "link" in second.headers) == (None, False)
    assert problem(api.http.get("/adapters", params={"method": "loha"}), 422)["errors"][0]["field"] == "method"
    api.catalog.bases.add("smollm2-int8", "8" * 64, BASE)
    assert api.http.get("/bases").json()["items"] == [
        {"name": "smollm2", "fingerprint": BASE, "of": None, "projections": []},
        {"name": "smollm2-int8", "fingerprint": "8" * 64, "of": BASE, "projections": []},
    ]


def test_search_and_tags(api: Api) -> None:
    for name in ("tone-de", "tone-en", "Tonic", "dates_de", "datesxde"):
        publish(api.catalog, name, 1)
    for name, key, value in (
        ("tone-de", "lang", "de"),
        ("dates_de", "lang", "de"),
        ("tone-en", "lang", "fr"),
        ("tone-en", "lang", "en"),
        ("tone-de", "x", ""),
        ("Tonic", "lang", "it"),
    ):
        answer = api.http.put(f"/adapters/{name}/tags/{key}", json={"value": value})
        assert (answer.status_code, answer.json()) == (200 if value == "en" else 201, {"key": key, "value": value})
    assert api.http.delete("/adapters/Tonic/tags/lang").status_code == 204
    problem(api.http.delete("/adapters/Tonic/tags/lang"), 404)
    problem(api.http.put("/adapters/Tonic/tags/a=b", json={"value": "x"}), 422)
    problem(api.http.put("/adapters/nobody/tags/a", json={"value": "x"}), 404)
    listed = api.http.get("/adapters/tone-de/tags").json()["items"]
    assert listed == [{"key": "lang", "value": "de"}, {"key": "x", "value": ""}]

    def names(**params: Any) -> list[str]:
        return [item["name"] for item in api.http.get("/adapters", params=params).json()["items"]]

    assert sorted(names(search="TON")) == ["Tonic", "tone-de", "tone-en"]
    assert names(search="s_d") == ["dates_de"]  # no pattern of SQL
    assert names(search="%") == []
    assert len(names(search="")) == 5
    assert names(tag="lang=de") == ["dates_de", "tone-de"]
    assert names(tag="lang") == ["dates_de", "tone-de", "tone-en"]
    assert names(tag=["lang=de", "x"]) == names(tag=["lang=de", "x="]) == ["tone-de"]
    assert names(tag="lang=de", search="dates") == ["dates_de"]
    page = api.http.get("/adapters", params={"tag": ["lang=de", "lang"], "limit": 1})
    assert page.links["next"]["url"].endswith("?tag=lang%3Dde&tag=lang&limit=1&cursor=dates_de")
    problem(api.http.get("/adapters", params={"tag": "=de"}), 422)
    problem(api.http.get("/adapters", params={"search": "x" * 97}), 422)
    with CatalogClient("http://test", transport=api.http._transport) as client:
        assert [a.name for a in client.adapters(search="tone", tags={"lang": "de", "x": None})] == ["tone-de"]


def test_missing_resources(api: Api) -> None:
    publish(api.catalog, "tone", 1)
    for path, detail in [
        ("/adapters/tune", "did you mean 'tone'"),
        ("/adapters/tone/versions/9", "has no version 9"),
        ("/adapters/tune/versions", "no adapter 'tune'"),
        ("/adapters/tone/aliases/prod", "has no alias 'prod'"),
        ("/adapters/tune/placement", "no adapter 'tune'"),
    ]:
        body = problem(api.http.get(path), 404)
        assert detail in body["detail"]
        assert body["type"] == "urn:loray:problem:adapter-not-found"
    assert "Invalid URL" in problem(api.http.get("/nothing"), 404)["detail"]
    assert problem(api.http.delete("/adapters"), 405)["detail"] == "DELETE is not allowed for /api/v1/adapters"
    for path in ("/adapters/a%00b", "/adapters/a%20b", f"/adapters/{'x' * 97}", "/adapters/tone/aliases/3"):
        assert problem(api.http.get(path), 422)["type"] == "urn:loray:problem:invalid"
    assert problem(api.http.get("/adapters/tone/versions/0"), 422)["errors"][0]["field"] == "version"


def test_placement(api: Api) -> None:
    publish(api.catalog, "tone", 1, 2)
    assert api.http.get("/adapters/tone/placement").json() == {"name": "tone", "items": []}
    fields = {"replica": "r1", "node": "n", "name": "other", "version": 9, "nbytes": 401, "num_tokens": 5, "uses": 3}
    fields |= {"digest": digest(1), "tier": "host", "last_used_at": 1.5}
    pooled = {"tier": "pool", "uses": 1, "last_used_at": 2.0}
    api.placements.found = [
        AdapterPlacement.model_validate(fields | more)
        for more in ({}, pooled | {"digest": digest(2), "replica": "r2"}, pooled | {"digest": digest(3)})
    ]
    items = api.http.get("/adapters/tone/placement").json()["items"]
    assert [(i["version"], i["tier"], i["uses"], i["replica"]) for i in items] == [
        (2, "pool", 1, "r2"),  # the versions of this name, not of the name that the replica knows
        (1, "host", 3, "r1"),
    ]
    assert items[1]["last_used_at"] == "1970-01-01T00:00:01.500000Z"


# -- registering ------------------------------------------------------------------------------------------------------


def test_registering_what_the_store_has(api: Api, tmp_path: Path) -> None:
    stored = [api.store(n, tmp_path) for n in range(3)]
    made = api.http.post("/adapters/tone/versions", json={"digest": stored[0], "aliases": ["prod"]})
    assert (made.status_code, made.headers["location"]) == (201, "/api/v1/adapters/tone/versions/1")
    assert (made.json()["aliases"], made.json()["manifest"]["nbytes"]) == (["prod"], 400)
    assert api.http.get(f"http://test{made.headers['location']}").json() == made.json()
    again = api.http.post("/adapters/tone/versions", json={"digest": stored[0]})
    assert again.json() == made.json()
    assert api.http.post("/adapters/tone/versions", json={"digest": stored[1], "version": 7}).json()["version"] == 7
    assert api.http.get("/adapters/tone").json()["base"] == "smollm2"

    taken = api.http.post("/adapters/tone/versions", json={"digest": stored[2], "version": 7})
    assert "tone@7 exists already" in problem(taken, 409)["detail"]
    problem(api.http.post("/adapters/smollm2/versions", json={"digest": stored[2]}), 409)
    missing = problem(api.http.post("/adapters/tone/versions", json={"digest": "0" * 64}), 404)
    assert missing["type"] == "urn:loray:problem:not-found"
    for body in ({"digest": "0" * 63}, {"digest": stored[2], "aliases": ["9"]}, {"digest": stored[2], "x": 1}):
        assert problem(api.http.post("/adapters/tone/versions", json=body), 422)["errors"]
    assert [v["version"] for v in api.http.get("/adapters/tone/versions").json()["items"]] == [7, 1]


def test_what_the_store_lacks_cannot_be_restored(api: Api, client: CatalogClient) -> None:
    publish(api.catalog, "tone", 1)
    client.delete("tone")
    with pytest.raises(ConflictError, match=f"the bytes of adapter {digest(1)[:12]} are gone; publish it again"):
        client.restore("tone")


def test_a_version_in_quarantine_says_so_and_is_released(api: Api, client: CatalogClient) -> None:
    publish(api.catalog, "tone", 1, 2)
    at = datetime(2026, 1, 1, tzinfo=UTC)
    api.catalog.quarantine.report_death(digest(2), "r1", at, lambda deaths: timedelta(minutes=deaths))
    assert [v.quarantine and v.quarantine.deaths for v in client.versions("tone")] == [1, None]
    shown = client.version("tone", 2).quarantine
    assert shown is not None
    assert (shown.died_at, shown.refused_until) == (at, at + timedelta(minutes=1))
    client.release("tone", 2)
    assert client.version("tone", 2).quarantine is None
    with pytest.raises(NotFoundError, match="tone@2 is not in quarantine"):
        client.release("tone", 2)
