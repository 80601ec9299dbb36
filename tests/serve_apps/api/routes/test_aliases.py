"""Aliases and canaries over HTTP, and by the command at a server."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from loray.client import CatalogClient
from loray.spec import CanaryCounts, RopeParameters
from tests.cli.run import Loray
from tests.fixtures.api import Api, problem
from tests.fixtures.figures import GOOD, NATIVE, OWN, counts, figures
from tests.fixtures.versions import publish

# -- aliases ----------------------------------------------------------------------------------------------------------


PROD = "/adapters/tone/aliases/prod"


def test_etags(api: Api) -> None:
    publish(api.catalog, "tone", 1, 2)
    made = api.http.put(PROD, json={"version": 1}, headers={"If-None-Match": "*"})
    first = made.headers["etag"]
    assert (made.status_code, made.json()["version"], first) == (201, 1, f'"{made.json()["revision"]}"')
    again = api.http.put(PROD, json={"version": 2}, headers={"If-None-Match": "*"})
    assert "rules out" in problem(again, 412)["detail"]

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
    assert api.catalog.aliases.of("tone") == (api.catalog.aliases.get("tone", "prod"),)
    assert problem(api.http.put(PROD, json={"version": 1}, headers={"If-Match": "17"}), 422)
    assert api.http.put(PROD, json={"version": 1}, headers={"If-Match": "*"}).json()["version"] == 1
    assert api.http.put(PROD, json={"version": 2}).json()["version"] == 2  # without a precondition it moves


def test_one_of_two_promotions_with_one_etag_wins(api: Api) -> None:
    publish(api.catalog, "tone", *range(1, 12), aliases=("prod",))
    for first in range(1, 10, 2):
        headers = {"If-Match": api.http.get(PROD).headers["etag"]}

        def promote(version: int, headers: dict[str, str] = headers) -> int:
            return api.http.put(PROD, json={"version": version}, headers=headers).status_code

        with ThreadPoolExecutor(2) as pool:
            assert sorted(pool.map(promote, (first, first + 1))) == [200, 412]


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
    assert api.catalog.aliases.moves("long")[0].no_gate == "a trial"
    assert api.http.post("/adapters/copy/versions", json=body | {"no_gate": "a copy"}).json()["aliases"] == ["prod"]

    api.catalog.evaluations.record(stored, figures(GOOD))
    assert api.http.put(prod, json={"version": 1}).status_code == 201
    version = api.http.get("/adapters/long/versions/1").json()
    assert [e["value"] for e in version["evaluations"]] == [11.0, *GOOD.values()]
    assert [e["value"] for e in version["manifest"]["evaluations"]] == [11.0]
    listed = api.http.get("/adapters/long/versions").json()["items"][0]
    assert listed["evaluations"] == version["evaluations"]
    assert version["evaluations"][-1]["stride"] == 256


def test_canaries(api: Api) -> None:
    publish(api.catalog, "tone", 1, 2, 3)
    api.catalog.aliases.move("tone", "prod", 2)
    problem(api.http.get(f"{PROD}/canary"), 404)
    etag = api.http.get(PROD).headers["etag"]
    body = {"version": 3, "percent": 10, "bounds": {"max_error_rate": 0.1, "max_ttft_ratio": None}}
    for wrong in ({"percent": 100}, {"percent": 0}, {"version": 0}, {"bounds": {"max_error_rate": 2}}, {"weight": 1}):
        problem(api.http.put(f"{PROD}/canary", json=body | wrong), 422)
    started = api.http.put(f"{PROD}/canary", json=body, headers={"If-Match": etag}).json()
    assert (started["stable"], started["version"], started["percent"], started["outcome"]) == (2, 3, 10, None)
    assert started["bounds"] == {"max_error_rate": 0.1, "max_ttft_ratio": None, "max_itl_ratio": 2, "min_requests": 50}
    now = api.http.get(PROD)
    assert now.headers["etag"] != etag
    assert (now.json()["version"], now.json()["weights"]) == (2, {"2": 90, "3": 10})
    assert api.http.get("/adapters/tone").json()["weights"] == {"prod": {"2": 90, "3": 10}}
    problem(api.http.put(f"{PROD}/canary", json=body, headers={"If-Match": etag}), 412)
    problem(api.http.put(f"{PROD}/canary", json=body | {"version": 1}), 409)
    problem(api.http.put(f"{PROD}/canary", json=body | {"version": 9}), 404)
    problem(api.http.delete("/adapters/tone/versions/3"), 409)
    running = api.catalog.canaries.get("tone")
    api.catalog.canaries.report("a", {running.id: CanaryCounts(counts(90), counts(12, errors=2))})
    counted = api.http.get(f"{PROD}/canary").json()["counts"]
    assert counted["canary"] == {"num_requests": 12, "num_errors": 2, "ttft_s": 0.1, "itl_s": 0.02}
    assert counted["stable"]["ttft_s"] == 0.1
    assert api.http.delete(f"{PROD}/canary").json()["outcome"] == "ended"
    problem(api.http.delete(f"{PROD}/canary"), 404)
    assert api.http.get(PROD).json()["weights"] == {"2": 100}


def test_the_command_at_a_server(api: Api, loray: Loray, url: str) -> None:
    publish(api.catalog, "tone", 1, 2, aliases=("prod",))
    with CatalogClient(url) as client:
        assert client.set_canary("tone", "prod", 1, 5).percent == 5
    grown = loray("adapters", "canary", "tone", "--version", 1, "--percent", 20, "--max-ttft-ratio", 3, "--json")
    assert json.loads(grown.out)["bounds"]["max_ttft_ratio"] == 3
    assert "prod→2:80%,1:20%" in loray("adapters", "ls").out
    assert "prod 20 %" in loray("adapters", "show", "tone").out
    assert json.loads(loray("adapters", "show", "tone", "--json").out)["weights"] == {"prod": {"1": 20, "2": 80}}
    assert json.loads(loray("adapters", "canary", "tone", "--end", "--json").out)["outcome"] == "ended"
