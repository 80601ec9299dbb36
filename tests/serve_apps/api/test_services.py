"""Failures of the catalog's API: without its database or its store, and with invalid requests."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from loray.catalog import Catalog
from loray.errors import CatalogError, StoreError
from loray.schemas.resources import Problem
from loray.settings import Settings
from tests.fixtures.api import Api, problem
from tests.fixtures.cluster import free_port
from tests.fixtures.postgres import Postgres
from tests.fixtures.versions import publish

PROD = "/adapters/tone/aliases/prod"


def test_without_its_database(tmp_path: Path) -> None:
    api = Api(tmp_path, f"postgresql://nobody@127.0.0.1:{free_port()}/none")
    for response in (
        api.http.get("/adapters"),
        api.http.put(PROD, json={"version": 1}),
        api.http.get("/adapters/tone/placement"),
        api.http.get("/jobs/job-1"),
    ):
        body = problem(response, 503)
        assert body["type"] == "urn:loray:problem:catalog-unavailable"
        assert response.headers["retry-after"] == "1"
    assert api.http.get("/openapi.json").status_code == 200
    assert "swagger" in api.http.get("/docs").text


def test_concurrent_requests_share_one_wait_for_the_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried, everybody_waits = [], Barrier(9, timeout=300)

    def unreachable(settings: Settings, actor: str) -> Catalog:
        tried.append(settings.catalog)
        everybody_waits.wait()
        raise CatalogError("no answer within 5 s")

    monkeypatch.setattr(Catalog, "of", unreachable)
    monkeypatch.setattr("serve_apps.api.services._RETRY_S", 3600.0)
    api = Api(tmp_path, f"sqlite:///{tmp_path}/catalog.db")

    def ask(number: int) -> int:
        if number:
            everybody_waits.wait()
        return api.http.get("/bases").status_code

    with ThreadPoolExecutor(9) as pool:
        assert list(pool.map(ask, range(9))) == [503] * 9
    assert len(tried) == 1
    assert api.services.store is not None  # which does not wait for the catalog
    monkeypatch.undo()
    api.services._failed_at = 0.0  # a second later
    assert api.http.get("/bases").status_code == 200
    api.close()


def test_an_unreachable_store_is_503(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(digest: str) -> None:
        raise StoreError("the bucket cannot be reached")

    monkeypatch.setattr(api.services.store, "manifest", gone)
    response = api.http.post("/adapters/tone/versions", json={"digest": "0" * 64})
    body = problem(response, 503)
    assert (body["type"], response.headers["retry-after"]) == ("urn:loray:problem:store-unavailable", "5")
    assert isinstance(Problem.model_validate(body).exception(), StoreError)


def test_a_database_that_goes_away_and_comes_back(tmp_path: Path, postgres: Postgres) -> None:
    url = postgres.new_database()
    name = url.rpartition("/")[2]
    api = Api(tmp_path, url)
    publish(api.catalog, "tone", 1)
    postgres.execute("postgres", f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    postgres.execute("postgres", f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
    assert "not currently accepting connections" in problem(api.http.get("/adapters/tone"), 503)["detail"]
    postgres.execute("postgres", f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    assert api.http.get("/adapters/tone").status_code == 200
    api.close()


def test_an_unforeseen_error_is_a_problem_without_details(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("secret")

    monkeypatch.setattr("loray.catalog.adapters.Bases.fingerprints", fail)
    body = problem(api.http.get("/bases"), 500)
    assert "secret" not in body["detail"]
