"""Every route of both applications, asked by everybody who must not get anything of another tenant from it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from loray.bases.registry import BaseModel
from tests.serve_apps.isolation.site import SCOPES, SECRET, UNSAID, Application, Site, site
from tests.serve_apps.isolation.table import NOBODY, OPEN, Thing

UNKNOWN = Thing()
ELSEWHERE = Thing(tenant="beta", name="nope-8")


@pytest.fixture(scope="module")
def both(tiny_base: Callable[..., BaseModel], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site(tiny_base(), tmp_path_factory.mktemp("home")) as made:
        yield made


@pytest.fixture(params=["gateway", "api"])
def application(both: Site, request: pytest.FixtureRequest) -> Application:
    found = getattr(both, request.param)
    assert isinstance(found, Application)
    return found


def test_the_table_has_every_route(application: Application) -> None:
    """A new route needs a line there, which says who may call it."""
    assert application.routes() == application.table.keys()
    for path, operations in application.app.openapi()["paths"].items():
        for method in operations:
            assert any(r.replace(":path", "") == f"{method.upper()} {path}" for r in application.table), path


@pytest.mark.parametrize("who", ["nobody", "wrong", "expired", "revoked"])
def test_without_a_good_key(both: Site, application: Application, who: str) -> None:
    key = {"nobody": None, "wrong": "sk-lr-" + "A" * 43}.get(who, both.keys.get(who))
    for name, route in application.table.items():
        answer = application.ask(name, SECRET, key)
        if route.scopes == OPEN:
            assert answer.status_code == route.status, (name, answer.text)
        else:
            assert answer.status_code == 401, (name, answer.text)
        assert not _told(answer.text, str(answer.headers), SECRET.digest, *UNSAID), name


@pytest.mark.parametrize("scope", SCOPES)
def test_each_scope_opens_its_routes_alone(both: Site, application: Application, scope: str) -> None:
    for name, route in application.table.items():
        status = application.ask(name, UNKNOWN, both.keys[f"acme {scope}"]).status_code
        if route.scopes == OPEN:
            assert status == route.status, name
        elif scope in route.scopes:
            assert status not in (401, 403, 500), name
        else:
            assert status == 403, name


def test_another_tenant_gets_what_it_gets_for_a_name_that_does_not_exist(
    both: Site, application: Application, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve_apps.auth.KEY_BURST", 1e6)  # every route is asked twice
    before, jobs = both.catalog.snapshot(), both.catalog.jobs.page().items
    for name, route in application.table.items():
        if route.scopes == OPEN:
            continue
        secret, unknown = (application.ask(name, thing, both.keys["beta"]) for thing in (SECRET, UNKNOWN))
        assert secret.status_code == unknown.status_code, name
        if route.scopes == NOBODY:
            assert secret.status_code == 403
        told = tuple(
            thing.hidden_in(answer.text).replace(answer.headers.get("request-id", "-"), "-")
            for thing, answer in ((SECRET, secret), (UNKNOWN, unknown))
        )
        if secret.status_code >= 400:
            assert told[0] == told[1], name
        assert not _told(secret.text + unknown.text, str(secret.headers), *UNSAID), name
        assert not _told(unknown.text, str(unknown.headers), SECRET.name, SECRET.alias, SECRET.digest, SECRET.job), name
        assert secret.headers.keys() == unknown.headers.keys(), name
    assert both.catalog.snapshot() == before
    assert both.catalog.jobs.page().items == jobs
    assert both.fakes.jobs.stopped == []


def test_lists_and_documents_name_nothing_of_others(both: Site, application: Application) -> None:
    for name, route in application.table.items():
        if name.startswith("GET") and "{" not in name:
            for thing in (ELSEWHERE, UNKNOWN):
                key = None if route.scopes == OPEN else both.keys["beta"]
                answer = application.ask(name, thing, key)
                words = (SECRET.name, SECRET.alias, SECRET.digest[:12], SECRET.job, *UNSAID)
                assert not _told(answer.text, str(answer.headers), *words), name


def test_the_own_tenant_and_administrators_get_it(both: Site) -> None:
    for key, name in (("acme publish", SECRET.name), ("admin", SECRET.model)):
        for application, route in ((both.gateway, "GET /v1/models"), (both.api, "GET /adapters")):
            assert SECRET.digest in application.ask(route, SECRET, both.keys[key]).text, name
    assert SECRET.job in both.api.ask("GET /jobs", SECRET, both.keys["acme train"]).text
    for key in ("acme tenant_admin", "admin"):
        for route in ("GET /keys", "GET /console/keys", "GET /keys/{id}"):
            assert "zq-alias" in both.api.ask(route, SECRET, both.keys[key]).text, (key, route)
        assert SECRET.job in both.api.ask("GET /jobs", SECRET, both.keys[key]).text
        assert SECRET.model in both.api.ask("GET /audit", SECRET, both.keys[key]).text
    assert "zq-words" in both.api.ask("GET /adapters/{name}/versions/{version}", SECRET, both.keys["admin"]).text
    assert f"{SECRET.model}@1" in both.gateway.ask("GET /status", SECRET, both.keys["admin"]).text


def _told(text: str, headers: str, *words: str) -> list[str]:
    return [word for word in words if word in text or word in headers]
