"""Pages of keys, tenants and usage."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime

import pytest

from loray.schemas.resources import UsageResource
from loray.spec import UsageEvent
from serve_apps.console.keys import bars_of
from tests.serve_apps.console.site import ROOT, ConsoleSite


def test_a_key_is_shown_once_and_revoked(console: ConsoleSite) -> None:
    console.log_in(console.key("admin"))
    wanted: dict[str, object] = {"key_alias": "ci", "tenant": "acme", "duration": "9d"}
    made = console.post("/keys", wanted | {"scopes": ["infer", "publish"]})
    secret = re.search(r"sk-lr-[\w-]+", made.text)
    assert (made.status_code, secret is not None, made.headers["cache-control"]) == (201, True, "no-store")
    assert secret is not None
    page = console.get("/keys", tenant="acme").text
    assert "infer, publish" in page
    assert secret.group() not in page
    (key,) = (key for key in console.catalog.keys.page().items if key.alias == "ci")
    assert console.post(f"/keys/{key.id}/revoke").headers["hx-redirect"].endswith("/console/keys")
    assert console.catalog.keys.get(key.id).revoked_at is not None


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"key_alias": "a", "scopes": "everything"}, "scopes"),
        ({"key_alias": "a", "scopes": "infer", "rpm_limit": "many"}, "whole number"),
        ({"key_alias": "a", "scopes": "infer", "duration": "soon"}, "duration"),
        ({"scopes": "infer"}, "key_alias"),
        ({"key_alias": "a"}, "scopes"),
    ],
)
def test_a_wrong_form_says_what_is_wrong(console: ConsoleSite, fields: dict[str, object], said: str) -> None:
    answer = console.post("/keys", fields)
    assert (answer.status_code, said in answer.text, "<main" in answer.text) == (422, True, False)
    assert console.catalog.keys.page().items == ()


def test_tenants(console: ConsoleSite) -> None:
    assert console.post("/tenants", {"name": "beta"}).status_code == 204
    assert console.post("/tenants", {"name": "beta"}).status_code == 409
    assert console.post("/tenants/beta/block").status_code == 204
    assert console.catalog.tenants.get("beta").blocked
    assert "Let pass" in console.get("/keys").text


def test_an_administrator_of_one_tenant_sees_and_makes_its_keys(console: ConsoleSite) -> None:
    for scope, tenant in (("admin", "default"), ("admin", "acme"), ("infer", "acme")):
        console.key(scope, tenant=tenant)
    console.log_in(console.key("tenant_admin", tenant="acme"))
    page = console.get("/keys").text
    assert ("acme-admin" in page, "acme-infer" in page, "default-admin" in page) == (True, True, False)
    assert "New tenant" not in page
    assert set(re.findall(r'name="scopes" value="(\w+)"', page)) == {"infer", "publish", "promote", "train"}
    assert re.findall(r'aria-label="Revoke ([\w-]+)"', page) == ["acme-infer"]
    assert console.post("/keys", {"key_alias": "ci", "scopes": ["infer"]}).status_code == 201
    assert console.catalog.keys.page(alias="ci").items[0].tenant == "acme"
    assert console.post("/keys", {"key_alias": "more", "scopes": ["admin"]}).status_code == 403
    assert console.post("/tenants", {"name": "beta"}).status_code == 403
    for section, is_shown in (("keys", True), ("jobs", True), ("adapters", False), ("serving", False)):
        assert (f'href="{ROOT}/{section}"' in page) == is_shown, section
    jobs = console.get("/jobs")
    assert (jobs.status_code, "New job" in jobs.text) == (200, False)


def test_the_list_of_tenants_ends(console: ConsoleSite) -> None:
    for number in range(201):
        console.catalog.tenants.create(f"t{number}")
    page = console.get("/keys").text
    assert "These are the first 200" in page
    assert page.count("/block") == 200


def test_usage_is_summed_up(console: ConsoleSite) -> None:
    now = datetime.now(UTC)
    events = [
        UsageEvent(
            request_id=f"r{number}",
            tenant=tenant,
            key_id=None,
            model=model,
            digest=None,
            num_prompt_tokens=10,
            num_cached_tokens=0,
            num_output_tokens=70_000 + number,
            tier="default",
            outcome="ok",
            seconds=1.0,
            created_at=now,
        )
        for number, (tenant, model) in enumerate((("default", "tone"), ("acme", "acme/vault")))
    ]
    console.catalog.usage.record(events)
    page = console.get("/usage").text
    assert "70,000" in page
    assert "140,001" in page  # the day's
    console.log_in(console.key("infer", tenant="acme"))
    page = console.get("/usage", by="model").text
    assert ("70,001" in page, "70,000" in page, "tone" in page) == (True, False, False)


def test_every_day_has_a_bar() -> None:
    counts = {"num_requests": 1, "num_prompt_tokens": 1, "num_cached_tokens": 0, "num_output_tokens": 50}
    rows = [UsageResource(tenant=None, key_id=None, model=None, day=date(2026, 1, 2), seconds=1.0, **counts)]
    bars = bars_of(rows, date(2026, 1, 1), 3)
    assert [(bar.day.day, bar.num_tokens, bar.height) for bar in bars] == [(1, 0, 0), (2, 50, 120), (3, 0, 0)]
    assert len(bars_of([], date(2026, 1, 1), 3)) == 3
