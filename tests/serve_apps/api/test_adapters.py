"""Adapters, versions and aliases over HTTP, on both databases."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from loray.client import CatalogClient
from loray.schemas.status import AdapterPlacement
from loray.spec import RopeParameters
from tests.fixtures.figures import GOOD, NATIVE, OWN, figures
from tests.fixtures.versions import BASE, digest, publish
from tests.serve_apps.api.fakes import Api


def problem(response: httpx.Response, status: int) -> Any:
    assert (response.status_code, response.headers["content-type"]) == (status, "application/problem+json")
    body = response.json()
    assert body["status"] == status
    assert body["title"]
    return body


# -- reading ----------------------------------------------------------------------------------------------------------


def test_pages_of_adapters(api: Api) -> None:
    api.catalog.add_base("smollm2", BASE)
    names = [f"adapter-{i}" for i in range(5)]
    for name in names:
        publish(api.catalog, name, 1)
    response = api.http.get("/adapters", params={"limit": 2, "base": "smollm2"})
    seen, pages = [], 0
    while True:
        body = response.json()
        seen += [item["name"] for item in body["items"]]
        pages += 1
        if body["next"] is None:
            assert "link" not in response.headers
            break
        following = response.links["next"]["url"]
        assert following == f"/api/v1/adapters?limit=2&base=smollm2&cursor={body['next']}"
        response = api.http.get(f"http://test{following}")
    assert (seen, pages) == (names, 3)
    assert api.http.get("/adapters", params={"method": "vera"}).json() == {"items": [], "next": None}
    assert problem(api.http.get("/adapters", params={"limit": 0}), 422)["errors"][0]["field"] == "limit"
    assert problem(api.http.get("/adapters", params={"method": "loha"}), 422)["errors"][0]["field"] == "method"
    assert api.http.get("/bases").json()["items"] == [{"name": "smollm2", "fingerprint": BASE, "projections": []}]


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


def test_an_adapter_and_its_versions(api: Api) -> None:
    publish(api.catalog, "tone", 1, 2, 3)
    api.catalog.promote("tone", "prod", 2)
    adapter = api.http.get("/adapters/tone").json()
    assert (adapter["version"], adapter["digest"], adapter["base"]) == (2, digest(2), None)
    assert (adapter["versions"], adapter["aliases"]) == ([3, 2, 1], {"prod": 2})
    page = api.http.get("/adapters/tone/versions", params={"limit": 2}).json()
    assert [(v["version"], v["aliases"]) for v in page["items"]] == [(3, []), (2, ["prod"])]
    assert "manifest" not in page["items"][0]
    page = api.http.get("/adapters/tone/versions", params={"cursor": page["next"]}).json()
    assert ([v["version"] for v in page["items"]], page["next"]) == ([1], None)
    version = api.http.get("/adapters/tone/versions/2").json()
    assert (version["digest"], version["manifest"]["files"]) == (digest(2), {"adapter_model.safetensors": digest(2)})


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
    assert "unknown URL" in problem(api.http.get("/nothing"), 404)["detail"]
    assert problem(api.http.delete("/adapters"), 405)["detail"] == "DELETE is not allowed for /api/v1/adapters"
    for path in ("/adapters/a%00b", "/adapters/a%20b", f"/adapters/{'x' * 97}", "/adapters/tone/aliases/3"):
        assert problem(api.http.get(path), 422)["type"] == "urn:loray:problem:invalid"
    assert problem(api.http.get("/adapters/tone/versions/0"), 422)["errors"][0]["field"] == "version"


def test_placement(api: Api) -> None:
    publish(api.catalog, "tone", 1, 2)
    assert api.http.get("/adapters/tone/placement").json() == {"name": "tone", "items": []}
    other = AdapterPlacement(
        replica="r1",
        node="n",
        name="other",
        version=9,
        nbytes=401,
        num_tokens=5,
        digest=digest(1),
        tier="host",
        uses=3,
        last_used_at=1.5,
    )
    pooled = {"tier": "pool", "uses": 1, "last_used_at": 2.0}
    api.placements.found = [
        other,
        other.model_copy(update=pooled | {"digest": digest(2), "replica": "r2"}),
        other.model_copy(update=pooled | {"digest": digest(3)}),
    ]
    items = api.http.get("/adapters/tone/placement").json()["items"]
    assert [(i["version"], i["tier"], i["uses"], i["replica"]) for i in items] == [
        (2, "pool", 1, "r2"),  # the versions of this name, not of the name that the replica knows
        (1, "host", 3, "r1"),
    ]
    assert items[1]["last_used_at"] == "1970-01-01T00:00:01.500000Z"


# -- aliases ----------------------------------------------------------------------------------------------------------

PROD = "/adapters/tone/aliases/prod"


def test_etags(api: Api) -> None:
    publish(api.catalog, "tone", 1, 2)
    made = api.http.put(PROD, json={"version": 1}, headers={"If-None-Match": "*"})
    first = made.headers["etag"]
    assert (made.status_code, made.json()["version"], first) == (201, 1, f'"{made.json()["revision"]}"')
    assert (
        "rules out" in problem(api.http.put(PROD, json={"version": 2}, headers={"If-None-Match": "*"}), 412)["detail"]
    )

    for header in (first, f"W/{first}", f'"0", {first}', "*"):
        unchanged = api.http.get(PROD, headers={"If-None-Match": header})
        assert (unchanged.status_code, unchanged.content, unchanged.headers["etag"]) == (304, b"", first)
    moved = api.http.put(PROD, json={"version": 2}, headers={"If-Match": f'"0", {first}'})
    assert (moved.status_code, moved.json()["version"]) == (200, 2)
    assert api.http.get(PROD, headers={"If-None-Match": first}).json() == moved.json()
    assert api.http.get(PROD, headers={"If-Match": moved.headers["etag"]}).json() == moved.json()

    stale = {"If-Match": first}
    for response in (
        api.http.get(PROD, headers=stale),
        api.http.put(PROD, json={"version": 1}, headers=stale),
        api.http.put(PROD, json={"version": 1}, headers={"If-Match": f"W/{moved.headers['etag']}"}),  # weak
        api.http.post(f"{PROD}/rollback", headers=stale),
        api.http.delete(PROD, headers=stale),
        api.http.put("/adapters/tone/aliases/beta", json={"version": 1}, headers={"If-Match": "*"}),
    ):
        assert problem(response, 412)["type"] == "urn:loray:problem:revision-conflict"
    assert api.catalog.aliases("tone") == (api.catalog.alias("tone", "prod"),)
    assert problem(api.http.put(PROD, json={"version": 1}, headers={"If-Match": "17"}), 422)
    assert api.http.put(PROD, json={"version": 1}, headers={"If-Match": "*"}).json()["version"] == 1
    assert api.http.put(PROD, json={"version": 2}).json()["version"] == 2  # without a precondition it moves


def test_roll_back_and_delete(api: Api) -> None:
    publish(api.catalog, "tone", 1, 2, aliases=("prod",))
    before = api.http.get(PROD)
    back = api.http.post(f"{PROD}/rollback", headers={"If-Match": before.headers["etag"]})
    assert back.json()["version"] == 1
    assert back.headers["etag"] not in ("", before.headers["etag"])
    assert "no earlier target" in problem(api.http.post(f"{PROD}/rollback"), 409)["detail"]
    assert [a["alias"] for a in api.http.get("/adapters/tone/aliases").json()["items"]] == ["prod"]
    gone = api.http.delete(PROD, headers={"If-Match": back.headers["etag"]})
    assert (gone.status_code, gone.content) == (204, b"")
    for headers in ({}, {"If-Match": back.headers["etag"]}):  # 404 before 412
        for method, path in (("GET", PROD), ("DELETE", PROD), ("POST", f"{PROD}/rollback")):
            problem(api.http.request(method, path, headers=headers), 404)
    assert api.http.put(PROD, json={"version": 1}).status_code == 201
    assert api.http.put(PROD, json={"version": 2}).status_code == 200
    for body in ({}, {"version": 0}, {"version": "x"}, {"version": 1, "more": 2}, [], {"version": 10**12}):
        assert problem(api.http.put(PROD, json=body), 422)["errors"]
    assert "no version 9" in problem(api.http.put(PROD, json={"version": 9}), 404)["detail"]
    problem(api.http.put("/adapters/tune/aliases/prod", json={"version": 1}, headers={"If-Match": "*"}), 404)


def test_one_of_two_promotions_with_one_etag_wins(api: Api) -> None:
    publish(api.catalog, "tone", *range(1, 12), aliases=("prod",))
    for first in range(1, 10, 2):
        headers = {"If-Match": api.http.get(PROD).headers["etag"]}

        def promote(version: int, headers: dict[str, str] = headers) -> int:
            return api.http.put(PROD, json={"version": version}, headers=headers).status_code

        with ThreadPoolExecutor(2) as pool:
            assert sorted(pool.map(promote, (first, first + 1))) == [200, 412]


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


# -- what was measured ------------------------------------------------------------------------------------------------


def test_the_gate_and_the_figures_that_pass_it(api: Api, tmp_path: Path) -> None:
    rope = RopeParameters(rope_type="linear", rope_theta=1e5, factor=2)
    fields = {"rope_parameters": rope, "context_length": OWN, "original_context_length": NATIVE}
    stored = api.store(1, tmp_path, **fields, evaluations=figures({("base", OWN): 11.0}))
    body = {"digest": stored, "aliases": ["prod"]}
    refused = problem(api.http.post("/adapters/long/versions", json=body), 409)
    assert refused["type"] == "urn:loray:problem:gate-refused"
    assert "at its own context of 2,048 tokens" in refused["detail"]
    problem(api.http.get("/adapters/long"), 404)
    assert api.http.post("/adapters/long/versions", json={"digest": stored}).status_code == 201
    prod = "/adapters/long/aliases/prod"
    assert problem(api.http.put(prod, json={"version": 1}), 409)["type"] == "urn:loray:problem:gate-refused"
    assert problem(api.http.put(prod, json={"version": 1, "no_gate": " "}), 422)["errors"][0]["field"] == "no_gate"
    beta = api.http.put("/adapters/long/aliases/beta", json={"version": 1, "no_gate": "a trial"})
    assert beta.status_code == 201
    assert api.catalog.adapter("long").moves[0].no_gate == "a trial"
    assert api.http.post("/adapters/copy/versions", json=body | {"no_gate": "a copy"}).json()["aliases"] == ["prod"]

    api.catalog.record_evaluations(stored, figures(GOOD))
    assert api.http.put(prod, json={"version": 1}).status_code == 201
    version = api.http.get("/adapters/long/versions/1").json()
    assert [e["value"] for e in version["evaluations"]] == [11.0, *GOOD.values()]
    assert [e["value"] for e in version["manifest"]["evaluations"]] == [11.0]
    listed = api.http.get("/adapters/long/versions").json()["items"][0]
    assert listed["evaluations"] == version["evaluations"]
    assert version["evaluations"][-1]["stride"] == 256
