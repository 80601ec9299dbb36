"""Keys, tenants, the audit log and usage over HTTP, with the typed client."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from loray.cli.main import cli
from loray.client import CatalogClient
from loray.errors import ConflictError, KeyNotFound, PermissionDenied, Unauthenticated
from loray.policy.auth import KeyRing
from loray.schemas.access import KeyChange, KeyCreation, TenantChange
from loray.spec import Limits, Principal
from tests.fixtures.api import Api, problem
from tests.fixtures.figures import event
from tests.fixtures.keys import access_of

ADMIN = "a key of the deployment itself, long enough"
As = Callable[[str], CatalogClient]


@pytest.fixture
def api(tmp_path: Path, catalog_url: str) -> Iterator[Api]:
    ring = KeyRing(static={hashlib.sha256(ADMIN.encode()).digest(): Principal(key_id="deployment", actor="root")})
    api = Api(tmp_path / "home", catalog_url, access_of(catalog_url, host="0.0.0.0", ring=ring))
    yield api
    api.close()


@pytest.fixture
def as_(api: Api) -> As:
    return lambda key: CatalogClient("http://test/", api_key=key, transport=api.transport)


def test_the_life_of_a_key(api: Api, as_: As) -> None:
    admin = as_(ADMIN)
    admin.create_tenant("acme", Limits(rpm_limit=60))
    wanted = KeyCreation(key_alias="ci", tenant="acme", scopes=("train",), models=("tone",), duration="1h", tpm_limit=9)
    made = admin.create_key(wanted)
    assert (made.tenant, made.scopes, made.models) == ("acme", ("train",), ("tone",))
    assert (made.tpm_limit, made.created_by) == (9, "root")
    assert made.expires is not None
    assert timedelta(minutes=59) < made.expires - datetime.now(UTC) <= timedelta(hours=1)
    holder = as_(made.key)
    assert holder.key() == admin.key(made.id)
    assert made.key not in repr(holder.key())
    with pytest.raises(PermissionDenied):
        list(holder.keys())
    with pytest.raises(PermissionDenied):
        holder.rotate_key("key-of-another")
    rotated = holder.rotate_key(made.id)
    with pytest.raises(Unauthenticated):
        holder.key()
    assert admin.change_key(rotated.id, KeyChange(blocked=True, limits=Limits())).tpm_limit is None
    with pytest.raises(PermissionDenied, match="blocked"):
        as_(rotated.key).key()
    assert admin.revoke_key(rotated.id).revoked_at is not None
    assert [key.id for key in admin.keys(tenant="acme", key_alias="ci")] == [rotated.id, made.id]
    with pytest.raises(KeyNotFound):
        admin.key()  # the deployment's own keys are not the catalog's
    with pytest.raises(ConflictError):
        admin.rotate_key(made.id)


def test_a_key_is_changed_by_litellms_names(api: Api, as_: As) -> None:
    admin = as_(ADMIN)
    made = admin.create_key(KeyCreation(key_alias="ci", models=("tone",), duration="1h", tpm_limit=9, rpm_limit=5))
    path = f"/keys/{made.id}"
    api.http.headers["Authorization"] = f"Bearer {ADMIN}"
    wanted = {"key_alias": "nightly", "models": None, "duration": "2d", "tpm_limit": None, "max_budget": 5.0}
    changed = api.http.patch(path, json=wanted | {"metadata": {"team": "a"}}).json()
    kept = ("key_alias", "models", "tpm_limit", "rpm_limit", "max_budget", "metadata", "blocked")
    assert [changed[name] for name in kept] == ["nightly", None, None, 5, 5.0, {"team": "a"}, False]
    assert timedelta(hours=47) < datetime.fromisoformat(changed["expires"]) - datetime.now(UTC) <= timedelta(days=2)
    assert api.http.patch(path, json={"expires": None}).json()["expires"] is None
    assert api.http.patch(path, json={}).json()["key_alias"] == "nightly"
    assert admin.change_key(made.id, KeyChange(models=("a", "b"))).models == ("a", "b")
    assert admin.change_key(made.id, KeyChange(limits=Limits(rpm_limit=1))).max_budget is None
    for wrong in (
        {"duration": "1h", "expires": "2030-01-01T00:00:00Z"},
        {"limits": {"rpm_limit": 1}, "tpm_limit": 2},
        {"rpm_limit": "many"},
        {"budget_duration": None},
        {"scopes": ["admin"]},
        {"tenant": "acme"},
    ):
        assert api.http.patch(path, json=wrong).status_code == 422, wrong
    admin.create_key(KeyCreation(key_alias="other"))
    assert api.http.patch(path, json={"key_alias": "other"}).status_code == 409
    with pytest.raises(PermissionDenied):
        as_(made.key).change_key(made.id, KeyChange(rpm_limit=10_000))


@pytest.fixture
def of_acme(as_: As) -> CatalogClient:
    """An administrator of acme, a tenant with limits."""
    admin = as_(ADMIN)
    admin.create_tenant("acme", Limits(rpm_limit=60, max_budget=1000.0, min_priority=-5))
    made = admin.create_key(KeyCreation(key_alias="boss", tenant="acme", scopes=("tenant_admin",)))
    return as_(made.key)


def test_an_administrator_of_one_tenant_keeps_its_keys(as_: As, of_acme: CatalogClient) -> None:
    made = of_acme.create_key(KeyCreation(key_alias="ci", scopes=("infer", "train"), rpm_limit=60, min_priority=-5))
    assert (made.tenant, made.created_by) == ("acme", f"boss ({of_acme.key().id})")
    holder = as_(made.key)
    assert holder.key() == of_acme.key(made.id)
    changed = of_acme.change_key(made.id, KeyChange(key_alias="nightly", rpm_limit=None, models=("tone",)))
    assert (changed.key_alias, changed.rpm_limit, changed.models) == ("nightly", None, ("tone",))
    assert of_acme.change_key(made.id, KeyChange(blocked=True)).blocked
    of_acme.change_key(made.id, KeyChange(blocked=False))
    rotated = of_acme.rotate_key(made.id)
    found = list(of_acme.keys())
    assert [key.key_alias for key in found] == ["nightly", "nightly", "boss"]
    assert of_acme.revoke_key(rotated.id).revoked_at is not None
    assert {entry.action for entry in of_acme.audit()} >= {"create_key", "update_key", "rotate_key", "revoke_key"}
    assert list(of_acme.jobs()) == []
    for refused in (of_acme.tenants, lambda: of_acme.tenant("acme"), lambda: list(of_acme.adapters())):
        with pytest.raises(PermissionDenied):
            refused()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"scopes": ("admin",)}, "with the scope admin"),
        ({"scopes": ("infer", "tenant_admin")}, "with the scope tenant_admin"),
        ({"scopes": ("act_for",)}, "with the scope act_for"),  # it would reach other tenants
        ({"tenant": "default"}, "keys of tenant acme"),
        ({"tenant": "nobody"}, "keys of tenant acme"),
        ({"rpm_limit": 61}, "rpm_limit .* which is 60"),
        ({"max_budget": 1000.5}, "max_budget .* which is 1000"),
        ({"min_priority": -6}, "min_priority .* which is -5"),
    ],
)
def test_an_administrator_of_one_tenant_gives_no_more_than_the_tenant_has(
    of_acme: CatalogClient, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(PermissionDenied, match=said):
        of_acme.create_key(KeyCreation(key_alias="ci", **given))
    (boss,) = of_acme.keys()
    assert boss.key_alias == "boss"
    if given.keys() & Limits.model_fields:
        made = of_acme.create_key(KeyCreation(key_alias="ci"))
        with pytest.raises(PermissionDenied, match=said):
            of_acme.change_key(made.id, KeyChange(**given))


def test_keys_that_an_administrator_of_one_tenant_does_not_change(api: Api, as_: As, of_acme: CatalogClient) -> None:
    admin, own = as_(ADMIN), of_acme.key()
    others = admin.create_key(KeyCreation(key_alias="others"))
    above = [
        admin.create_key(KeyCreation(key_alias=scope, tenant="acme", scopes=(scope,)))
        for scope in ("admin", "act_for", "tenant_admin")
    ]
    before = api.catalog.keys.changes().counter
    for key in (others, *above, own):
        error = KeyNotFound if key is others else PermissionDenied
        with pytest.raises(error):
            of_acme.change_key(key.id, KeyChange(blocked=True))
        with pytest.raises(error):
            of_acme.change_key(key.id, KeyChange(key_alias="mine"))
        with pytest.raises(error):
            of_acme.revoke_key(key.id)
        if key is not own:
            with pytest.raises(error):
                of_acme.rotate_key(key.id)
    assert api.catalog.keys.changes().counter == before
    with pytest.raises(KeyNotFound):
        of_acme.key(others.id)
    found = list(of_acme.keys())
    assert {key.id for key in found} == {own.id, *(key.id for key in above)}
    assert list(of_acme.keys(tenant="default")) == []
    api.http.headers["Authorization"] = f"Bearer {above[2].key}"
    assert api.http.get("/keys", params={"cursor": others.id}).status_code == 422
    assert of_acme.rotate_key(own.id).scopes == ("tenant_admin",)  # as any key replaces itself


def test_an_administrator_for_some_models_gives_these_alone(as_: As, of_acme: CatalogClient) -> None:
    admin = as_(ADMIN)
    wanted = KeyCreation(key_alias="narrow", tenant="acme", scopes=("tenant_admin",), models=("tone", "legal"))
    narrow = as_(admin.create_key(wanted).key)
    made = narrow.create_key(KeyCreation(key_alias="ci", models=("tone",)))
    wide = of_acme.create_key(KeyCreation(key_alias="wide"))
    for refused in (
        lambda: narrow.create_key(KeyCreation(key_alias="all")),
        lambda: narrow.create_key(KeyCreation(key_alias="other", models=("tone", "other"))),
        lambda: narrow.change_key(made.id, KeyChange(models=None)),
        lambda: narrow.rotate_key(wide.id),
    ):
        with pytest.raises(PermissionDenied, match="models among these alone"):
            refused()


def test_limits_that_were_lowered_hold_up_no_other_change(as_: As, of_acme: CatalogClient) -> None:
    made = of_acme.create_key(KeyCreation(key_alias="ci", rpm_limit=60))
    as_(ADMIN).change_tenant("acme", TenantChange(limits=Limits(rpm_limit=10)))
    assert of_acme.change_key(made.id, KeyChange(blocked=True)).blocked
    with pytest.raises(PermissionDenied, match="which is 10"):
        of_acme.change_key(made.id, KeyChange(rpm_limit=20))


def test_the_audit_log_is_of_ones_own_tenant(as_: As) -> None:
    admin = as_(ADMIN)
    admin.create_tenant("acme")
    made = admin.create_key(KeyCreation(key_alias="ci", tenant="acme", scopes=("publish",)))
    admin.create_key(KeyCreation(key_alias="other", scopes=("publish",)))
    assert {entry.tenant for entry in admin.audit()} == {"acme", "default"}
    mine = list(as_(made.key).audit())
    assert {(entry.tenant, entry.actor) for entry in mine} == {("acme", "root")}
    assert list(as_(made.key).audit(tenant="default")) == mine
    assert [e.subject for e in admin.audit(action="create_key", tenant="acme")] == [made.id]
    assert list(admin.audit(since=datetime.now(UTC) + timedelta(minutes=1))) == []


def test_wrong_wishes(api: Api) -> None:
    with pytest.raises(ValueError, match="not both"):
        KeyCreation(key_alias="ci", duration="1h", expires=datetime.now(UTC))
    api.http.headers["Authorization"] = f"Bearer {ADMIN}"
    for wrong in ({"scopes": []}, {"scopes": ["root"]}, {"expires": "0001-01-01T00:00:00+10:00"}, {"colour": 1}):
        assert api.http.post("/keys", json={"key_alias": "ci"} | wrong).status_code == 422
    answer = api.http.post("/keys", json={"key_alias": "ci"})
    assert (answer.status_code, answer.headers["cache-control"]) == (201, "no-store")
    assert api.http.get(answer.headers["location"].removeprefix("/api/v1")).json()["key_alias"] == "ci"


@pytest.fixture
def used(api: Api) -> Api:
    now = datetime.now(UTC)
    others = event(3, created_at=now, tenant="other", model="tone", key_id=None)
    api.catalog.usage.record([event(1, created_at=now), event(2, created_at=now, key_id="k2"), others])
    api.http.headers["Authorization"] = f"Bearer {ADMIN}"
    return api


def rows(api: Api, **params: Any) -> list[tuple[Any, ...]]:
    items = api.http.get("/usage", params=params).raise_for_status().json()["items"]
    return [(row["tenant"], row["key_id"], row["num_requests"], row["num_prompt_tokens"]) for row in items]


def test_an_administrator_sees_all(used: Api) -> None:
    assert rows(used) == [(None, None, 3, 30)]
    assert rows(used, group_by="tenant") == [("acme", None, 2, 20), ("other", None, 1, 10)]
    assert rows(used, tenant="acme", group_by=["key", "tenant"]) == [("acme", "k1", 1, 10), ("acme", "k2", 1, 10)]
    assert rows(used, since="2999-01-01") == [(None, None, 0, 0)]
    problem(used.http.get("/usage", params={"since": "0001-01-01T00:00:00+09:00"}), 422)
    assert rows(used, since="0001-01-01T00:00:00", until="9999-12-31T23:59:59") == [(None, None, 3, 30)]
    first = used.http.get("/usage", params={"group_by": "tenant", "limit": 1})
    second = used.http.get(f"http://test{first.links['next']['url']}").json()
    assert [row["tenant"] for row in second["items"]] == ["other"]
    assert second["next"] is None
    for number in ("274", "1700000000", "1.7e9", "-1"):  # seconds since 1970, as far as one can guess
        problem(used.http.get("/usage", params={"until": number}), 422)
        problem(used.http.get("/audit", params={"since": number}), 422)
    problem(used.http.post("/keys", json={"key_alias": "ci", "expires": 4_000_000_000}), 422)
    for wrong in ({"group_by": "hour"}, {"since": "yesterday"}, {"cursor": "-1"}, {"key_id": "a\0"}, {"model": "\0"}):
        problem(used.http.get("/usage", params=wrong), 422)


def test_a_tenant_sees_its_own_whatever_it_asks(used: Api) -> None:
    with used.by(Principal(tenant="other", scopes=frozenset({"infer"}), key_id="k9")) as used.http:
        for asked in ({}, {"tenant": "acme"}, {"tenant": "other"}):
            assert rows(used, group_by="tenant", **asked) == [("other", None, 1, 10)]
        assert rows(used, key_id="k1") == [(None, None, 0, 0)]


def test_usage_in_the_command(used: Api, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LORAY_CATALOG", used.settings.catalog)
    shown = CliRunner().invoke(cli, ["usage", "--by", "tenant", "--by", "key"]).output
    found = [line.split()[:3] for line in shown.splitlines() if "acme" in line]
    assert found == [["acme", "k1", "1"], ["acme", "k2", "1"]]
    assert "no requests" in CliRunner().invoke(cli, ["usage", "--tenant", "nobody"]).output
