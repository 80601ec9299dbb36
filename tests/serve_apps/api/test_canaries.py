"""Canaries over HTTP, and by the command at a server."""

from __future__ import annotations

import json

from loray.client import CatalogClient
from loray.spec import CanaryCounts
from tests.cli.run import Loray
from tests.fixtures.figures import counts
from tests.fixtures.versions import publish
from tests.serve_apps.api.fakes import Api
from tests.serve_apps.api.test_adapters import problem

PATH = "/adapters/tone/aliases/prod"


def test_canaries(api: Api) -> None:
    publish(api.catalog, "tone", 1, 2, 3)
    api.catalog.promote("tone", "prod", 2)
    problem(api.http.get(f"{PATH}/canary"), 404)
    etag = api.http.get(PATH).headers["etag"]
    body = {"version": 3, "percent": 10, "bounds": {"max_error_rate": 0.1, "max_ttft_ratio": None}}
    for wrong in ({"percent": 100}, {"percent": 0}, {"version": 0}, {"bounds": {"max_error_rate": 2}}, {"weight": 1}):
        problem(api.http.put(f"{PATH}/canary", json=body | wrong), 422)
    started = api.http.put(f"{PATH}/canary", json=body, headers={"If-Match": etag}).json()
    assert (started["stable"], started["version"], started["percent"], started["outcome"]) == (2, 3, 10, None)
    assert started["bounds"] == {"max_error_rate": 0.1, "max_ttft_ratio": None, "max_itl_ratio": 2, "min_requests": 50}
    now = api.http.get(PATH)
    assert now.headers["etag"] != etag
    assert (now.json()["version"], now.json()["weights"]) == (2, {"2": 90, "3": 10})
    assert api.http.get("/adapters/tone").json()["weights"] == {"prod": {"2": 90, "3": 10}}
    problem(api.http.put(f"{PATH}/canary", json=body, headers={"If-Match": etag}), 412)
    problem(api.http.put(f"{PATH}/canary", json=body | {"version": 1}), 409)
    problem(api.http.put(f"{PATH}/canary", json=body | {"version": 9}), 404)
    problem(api.http.delete("/adapters/tone/versions/3"), 409)
    running = api.catalog.canary("tone")
    api.catalog.report_canaries("a", {running.id: CanaryCounts(counts(90), counts(12, errors=2))})
    counted = api.http.get(f"{PATH}/canary").json()["counts"]
    assert counted["canary"] == {"num_requests": 12, "num_errors": 2, "ttft_s": 0.1, "itl_s": 0.02}
    assert counted["stable"]["ttft_s"] == 0.1
    assert api.http.delete(f"{PATH}/canary").json()["outcome"] == "ended"
    problem(api.http.delete(f"{PATH}/canary"), 404)
    assert api.http.get(PATH).json()["weights"] == {"2": 100}


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
