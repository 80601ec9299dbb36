"""Keys in front of the gateway and of the catalog's API."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI

from loray.spec import SCOPES, Limits
from serve_apps.auth import REFRESH_S, Permissions
from tests.fixtures.catalogs import sqlite_catalog
from tests.serve_apps.access.conftest import METRICS, STATIC, Site, bearer
from tests.serve_apps.api.fakes import Api
from tests.serve_apps.asking import eventually

SiteOf = Callable[..., Site]
OPEN = {"/health", "/ping", "/version"}
JSON = {"Content-Type": "application/json"}


def code_of(response: Any) -> tuple[int, str]:
    """Status and kind, in the form of either application."""
    body = response.json()
    return response.status_code, body["error"]["code"] if "error" in body else body["type"].rpartition(":")[2]


def operations(document: Any) -> list[tuple[str, str]]:
    return [(method.upper(), path) for path, methods in document["paths"].items() for method in methods]


def filled(path: str) -> str:
    return "/".join("x" if part.startswith("{") else part for part in path.split("/"))


def test_no_route_passes_without_a_key(site_of: SiteOf) -> None:
    """From the OpenAPI documents, so that a new route is not forgotten."""
    site = site_of()
    for client, kind in ((site.gateway, "invalid_api_key"), (site.api, "unauthenticated")):
        for method, path in operations(client.get("/openapi.json").json()):
            for headers in ({}, bearer("sk-lr-" + "x" * 43), {"Authorization": "Basic eDp5"}):
                response = client.request(method, filled(path), headers=headers | JSON)
                if path in OPEN:
                    assert response.status_code == 200
                else:
                    assert code_of(response) == (401, kind), (method, path)
                    assert response.headers["www-authenticate"] == "Bearer"


def test_every_route_has_its_action(site_of: SiteOf, tmp_path: Path) -> None:
    """None is an administrator's by accident."""
    of_administrators = {"/tenants", "/tenants/{name}", "/adapters/{name}/transfer"}
    with closing(Api(tmp_path / "api", sqlite_catalog(tmp_path))) as api:
        for app in (site_of().gateway.app, api.unmounted):
            assert isinstance(app, FastAPI)
            permissions = Permissions(app.routes)
            for method, path in operations(app.openapi()):
                expected = path in of_administrators or path.endswith("/quarantine") or path in ("/status", "/metrics")
                action = permissions.named(method, path)
                assert (action in ("manage", "observe")) == expected, (method, path)
                assert (action == "manage_own") == (path in ("/keys", "/keys/{id}")), (method, path)


def test_a_route_that_does_not_say_who_may_call_it() -> None:
    app = FastAPI(docs_url=None, redoc_url=None)
    app.add_api_route("/new", lambda: None)
    with pytest.raises(TypeError, match="does not say who may call it"):
        Permissions(app.routes)


@pytest.mark.parametrize("path", ["//v1/models", "/V1/models", "/nothing", "/redoc"])
def test_a_path_that_is_no_route_is_none_for_everybody(site_of: SiteOf, path: str) -> None:
    site = site_of()
    for headers in ({}, bearer("sk-lr-wrong"), site.key("infer"), site.key("admin")):
        answer = site.gateway.get(f"http://testserver{path}", headers=headers, follow_redirects=False)
        assert code_of(answer) == (404, "unknown_url"), headers
        assert "nothing" not in path or answer.json()["error"]["message"] == "unknown URL: GET /nothing"
    assert site.api.get("nothing").status_code == 404


def test_a_method_that_a_path_does_not_have(site_of: SiteOf) -> None:
    site = site_of()
    for headers in ({}, site.key("infer")):
        answer = site.gateway.delete("/v1/completions", headers=headers)
        assert (*code_of(answer), answer.headers["allow"]) == (405, "method_not_allowed", "POST")
        answer = site.api.put("adapters/tone", headers=headers)
        assert (answer.status_code, answer.headers["allow"]) == (405, "DELETE, GET, PATCH")
        answer = site.gateway.options("/v1/chat/completions", headers=headers)
        assert (answer.status_code, answer.headers["allow"], answer.text) == (204, "POST", "")


def test_scopes_on_both_applications(site_of: SiteOf) -> None:
    site = site_of()
    site.catalog.add_base("smollm2", "b" * 64)
    passes = {
        "infer": {"complete", "models", "adapters", "bases"},
        "publish": {"models", "adapters", "bases"},
        "promote": {"models", "adapters", "bases"},
        "train": {"models", "adapters", "bases", "jobs"},
        "tenant_admin": {"bases", "jobs"},
        "act_for": {"bases"},
        "admin": {"complete", "models", "adapters", "bases", "jobs", "status", "metrics"},
    }
    for scope in SCOPES:
        key = site.key(scope)
        answers = {"complete": site.complete(key)}
        answers |= {path: site.gateway.get(f"/{path}", headers=key) for path in ("status", "metrics")}
        answers["models"] = site.gateway.get("/v1/models", headers=key)
        answers |= {path: site.api.get(path, headers=key) for path in ("adapters", "bases", "jobs")}
        assert {name for name, answer in answers.items() if answer.status_code == 200} == passes[scope], scope
        refused = [answer for name, answer in answers.items() if name not in passes[scope]]
        assert {code_of(answer)[0] for answer in refused} <= {403}


def test_a_key_that_is_no_longer_good(site_of: SiteOf) -> None:
    site = site_of()
    past = datetime.now(UTC) - timedelta(seconds=1)
    assert code_of(site.complete(site.key("infer", expires_at=past))) == (401, "invalid_api_key")
    key = site.key("infer")
    newest = site.catalog.keys().keys[0]
    site.catalog.update_key(newest.id, blocked=True)
    site.refresh()
    assert code_of(site.complete(key)) == (403, "permission_denied")
    assert code_of(site.api.get("adapters", headers=key)) == (403, "permission-denied")
    site.catalog.update_key(newest.id, blocked=False)
    site.catalog.update_tenant("default", blocked=True)
    site.refresh()
    assert code_of(site.complete(key)) == (403, "permission_denied")


def test_a_revoked_key_is_refused_by_running_servers(site_of: SiteOf) -> None:
    assert REFRESH_S <= 1  # and the time of one query: two seconds are promised
    site = site_of()
    key = site.key("infer")
    assert site.complete(key).status_code == 200
    site.catalog.revoke_key(site.catalog.keys().keys[0].id)
    assert eventually(lambda: site.complete(key).status_code == 401)
    assert eventually(lambda: site.api.get("adapters", headers=key).status_code == 401)


def test_the_deployments_own_keys(site_of: SiteOf) -> None:
    site = site_of("127.0.0.1", static=True)
    assert site.complete({}).status_code == 401  # also on loopback
    for path in ("/metrics", "/status"):
        assert site.gateway.get(path, headers=bearer(METRICS)).status_code == 200
        assert site.gateway.get(path, headers=bearer(STATIC)).status_code == 200
    assert site.complete(bearer(STATIC)).status_code == 200
    for answer in (site.complete(bearer(METRICS)), site.api.get("bases", headers=bearer(METRICS))):
        assert answer.status_code == 403


def test_loopback_needs_no_key_until_one_is_made(site_of: SiteOf) -> None:
    site = site_of("127.0.0.1")
    assert site.complete({}).status_code == 200
    assert site.complete(bearer("none")).status_code == 200  # OpenAI's client always sends one
    assert site.api.get("adapters").status_code == 200
    assert site.gateway.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
    assert site.complete({"Origin": "http://evil.example"}).status_code == 403
    for path in ("adapters/tone/aliases/prod/rollback", "jobs/job-1/stop"):
        assert code_of(site.api.post(path)) == (403, "permission-denied")
        assert site.api.post(path, headers=JSON).status_code == 404
    key = site.key("infer")
    site.catalog.revoke_key(site.catalog.keys().keys[0].id)
    site.refresh()
    assert site.complete({}).status_code == 401  # the last revocation opens nothing
    assert site.complete(key).status_code == 401
    assert site.gateway.get("/v1/models", headers=site.key("infer") | {"Host": "proxy.example"}).status_code == 200


def test_tenants_are_named_by_keys_that_may(site_of: SiteOf) -> None:
    site = site_of()
    site.catalog.create_tenant("acme", Limits(min_priority=-5))
    proxy, plain = site.key("infer", "act_for"), site.key("infer", tenant="acme")
    for headers, tenant in ((proxy | {"X-Tenant-Id": "acme"}, "acme"), (proxy, "default"), (plain, "acme")):
        assert site.complete(headers, user="x", priority=-7).status_code == 200
        assert site.engines.requests[-1].tenant == tenant
        assert site.engines.requests[-1].priority == 0  # only one of both may ask for less
    for refused in (plain | {"X-Tenant-Id": "default"}, proxy | {"X-Tenant-Id": "nobody"}):
        assert code_of(site.complete(refused)) == (403, "permission_denied")


def test_a_header_that_comes_twice(site_of: SiteOf) -> None:
    site = site_of()
    key = site.key("infer")["Authorization"]
    headers = [("Authorization", "Bearer x"), ("Authorization", key)]
    assert code_of(site.gateway.get("/v1/models", headers=headers)) == (401, "invalid_api_key")


def test_the_last_use_is_noted_when_the_server_ends(site_of: SiteOf) -> None:
    site = site_of()
    key = site.key("infer")
    for _ in range(3):
        assert site.complete(key).status_code == 200
    assert site.catalog.keys().keys[0].last_used_at is None  # once a minute at most
    site.gateway.__exit__()
    used = site.catalog.keys().keys[0].last_used_at
    assert used is not None
    assert used.second == 0
    site.gateway.__enter__()
