"""API keys, tenants, the audit log's pages, and logins of the console."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from loray.catalog import Catalog, identity
from loray.catalog.database import reading
from loray.catalog.queries import now
from loray.errors import ConflictError, KeyNotFound, LorayError, SpecError
from loray.spec import Limits, account_of
from tests.fixtures.calls import refused


def test_a_key_is_shown_once_and_its_hash_is_kept(catalog: Catalog) -> None:
    secret, key = catalog.create_key("ci", scopes=("publish", "infer"), limits=Limits(rpm_limit=60), models={"tone"})
    assert re.fullmatch(r"sk-lr-[A-Za-z0-9_-]{43}", secret)
    assert secret.startswith(f"sk-lr-{key.prefix}")
    assert catalog.key(key.id) == key
    with reading(catalog._engine) as c:
        stored = repr([c.execute(sa.text(f"SELECT * FROM {t}")).all() for t in ("keys", "audit_log")])
    assert secret[len("sk-lr-") + 8 :] not in stored
    assert secret not in repr(key)


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"tenant": "nobody"}, KeyNotFound),
        ({"scopes": ()}, SpecError),
        ({"scopes": ("root",)}, SpecError),
        ({"alias": "no\nlines"}, SpecError),
    ],
)
def test_a_wrong_key_is_refused(catalog: Catalog, given: dict[str, object], error: type[LorayError]) -> None:
    fields: dict[str, object] = {"alias": "ci"} | given
    refused(error, "", catalog.create_key, fields.pop("alias"), **fields)  # type: ignore[arg-type]
    assert catalog.keys().keys == ()


@pytest.mark.parametrize("grace", [timedelta(), timedelta(hours=1)])
def test_rotation(catalog: Catalog, grace: timedelta) -> None:
    limits = Limits(tpm_limit=1000)
    secret, old = catalog.create_key("ci", scopes=("train",), limits=limits, metadata={"team": "a"})
    other, new = catalog.rotate_key(old.id, grace=grace)
    assert other != secret
    assert (new.id, account_of(new.id)) == (f"{old.id}_2", old.id)
    assert catalog.rotate_key(new.id).key.id == f"{old.id}_3"
    same = {"alias", "tenant", "scopes", "limits", "metadata", "models", "expires_at"}
    assert new.model_dump(include=same) == old.model_dump(include=same)
    ended = catalog.key(old.id)
    assert (ended.revoked_at is None) == bool(grace)
    assert (ended.expires_at is not None) == bool(grace)
    if not grace:
        refused(ConflictError, "", catalog.rotate_key, old.id)


def test_changes_since_a_counter(catalog: Catalog) -> None:
    first = catalog.key_changes()
    assert (first.keys, first.any_keys) == ((), False)
    assert [t.name for t in first.tenants] == ["default"]
    _, key = catalog.create_key("ci")
    made = catalog.key_changes(first.counter)
    assert ([k.key for k in made.keys], made.tenants, made.any_keys) == ([key], (), True)
    catalog.record_key_use({key.id: datetime(2026, 1, 1, tzinfo=UTC)})
    assert catalog.key_changes(made.counter).counter == made.counter
    assert catalog.key(key.id).last_used_at == datetime(2026, 1, 1, tzinfo=UTC)
    catalog.update_key(key.id, blocked=True)
    catalog.update_tenant("default", limits=Limits(max_jobs=2))
    changed = catalog.key_changes(made.counter)
    assert [k.key.blocked for k in changed.keys] == [True]
    assert [t.limits.max_jobs for t in changed.tenants] == [2]
    catalog.revoke_key(key.id)
    revoked = catalog.key_changes(changed.counter)
    assert (revoked.keys[0].key.revoked_at is not None, revoked.any_keys) == (True, True)
    catalog.revoke_key(key.id)  # as all that follows, it changes nothing
    catalog.update_key(key.id, blocked=True, limits=Limits())
    catalog.update_tenant("default", blocked=False)
    assert catalog.change_counter() == revoked.counter


def test_what_of_a_key_changes(catalog: Catalog) -> None:
    _, key = catalog.create_key("ci", models=["tone"], limits=Limits(rpm_limit=5, tpm_limit=9), metadata={"team": "a"})
    before, soon = catalog.change_counter(), datetime.now(UTC) + timedelta(days=1)
    changed = catalog.update_key(key.id, alias="nightly", single_limits={"tpm_limit": None, "max_budget": 7.0})
    assert (changed.alias, changed.limits, changed.models) == (
        "nightly",
        Limits(rpm_limit=5, max_budget=7.0),
        frozenset({"tone"}),
    )
    assert [k.key for k in catalog.key_changes(before).keys] == [changed]
    changed = catalog.update_key(key.id, models=None, expires_at=soon, metadata={})
    assert (changed.models, changed.expires_at, changed.metadata, changed.alias) == (None, soon, {}, "nightly")
    assert catalog.update_key(key.id, expires_at=None).expires_at is None
    (last, *_) = catalog.audit(action="update_key").entries
    assert (last.subject, last.detail) == (key.id, {"changed": ["expires_at"]})
    refused(SpecError, "rpm_limit", catalog.update_key, key.id, single_limits={"rpm_limit": -1})
    refused(KeyNotFound, "", catalog.update_key, "key-0", alias="x")


def test_two_keys_in_use_never_have_one_alias(catalog: Catalog) -> None:
    catalog.create_tenant("acme")
    _, first = catalog.create_key("ci")
    refused(ConflictError, first.id, catalog.create_key, "ci")
    catalog.create_key("ci", tenant="acme")
    _, second = catalog.create_key("nightly")
    with pytest.raises(ConflictError, match=f"key {first.id} of tenant default has the alias 'ci'"):
        catalog.update_key(second.id, alias="ci")
    assert catalog.update_key(first.id, alias="ci").alias == "ci"  # its own
    _, third = catalog.rotate_key(first.id, grace=timedelta(hours=1))
    assert catalog.update_key(third.id, expires_at=None).alias == "ci"  # the old one goes on for an hour
    catalog.update_key(third.id, alias="other")
    catalog.revoke_key(first.id, only_this=True)
    assert catalog.update_key(second.id, alias="ci").alias == "ci"
    refused(ConflictError, "", catalog.update_key, third.id, alias="ci")


def test_keys_in_pages(catalog: Catalog) -> None:
    made = [catalog.create_key(f"key {i}").key.id for i in range(5)]
    found, cursor = [], None
    while True:
        page = catalog.keys(limit=2, cursor=cursor)
        found += [key.id for key in page.keys]
        if (cursor := page.next) is None:
            break
    assert found == made[::-1]
    assert [k.id for k in catalog.keys(alias="key 3").keys] == [made[3]]
    refused(SpecError, "", catalog.keys, cursor="key-0")


def test_tenants(catalog: Catalog) -> None:
    catalog.create_tenant("acme", Limits(max_stored_bytes=1 << 30))
    assert [t.name for t in catalog.tenants()] == ["acme", "default"]
    for wrong, error in {"acme": ConflictError, "a/b": SpecError, "": SpecError}.items():
        refused(error, "", catalog.create_tenant, wrong)
    refused(KeyNotFound, "", catalog.update_tenant, "nobody", blocked=True)


def test_the_audit_log_in_pages(catalog: Catalog) -> None:
    _, key = catalog.create_key("ci")
    catalog.update_key(key.id, blocked=True)
    catalog.revoke_key(key.id)
    page = catalog.audit(limit=2)
    assert [e.action for e in page.entries] == ["revoke_key", "update_key"]
    assert [e.action for e in catalog.audit(cursor=page.next).entries] == ["create_key"]
    (entry,) = catalog.audit(action="create_key", subject=key.id, actor="local", tenant="default").entries
    assert entry.detail["alias"] == "ci"
    assert catalog.audit(since=datetime.now(UTC) + timedelta(minutes=1)).entries == ()
    assert catalog.audit(tenant="acme").entries == ()


def test_a_login_ends_by_time_at_logout_and_by_number(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    began = now()

    def at(moment: timedelta) -> None:
        monkeypatch.setattr(identity, "now", lambda: began + moment)

    at(timedelta())
    catalog.begin_login("a", "sealed a")
    catalog.begin_login("b", "sealed b")
    at(timedelta(hours=11))
    assert catalog.find_login("a") == "sealed a"
    at(timedelta(hours=13))
    assert (catalog.find_login("a"), catalog.find_login("b")) == ("sealed a", None)
    at(timedelta(hours=23))
    assert catalog.find_login("a") == "sealed a"
    at(timedelta(hours=24, seconds=1))  # however often it was used
    assert catalog.find_login("a") is None
    monkeypatch.setattr(identity, "MOST", 2)
    for name in "cde":
        at(timedelta(days=2, minutes=ord(name)))
        catalog.begin_login(name, name)
    assert [catalog.find_login(name) for name in "abcde"] == [None, None, None, "d", "e"]
    with catalog._engine.connect() as c:
        assert c.execute(sa.text("SELECT count(*) FROM logins")).scalar_one() == 2
    catalog.end_login("d")
    catalog.end_login("d")
    assert catalog.find_login("d") is None
    actions = [entry.action for entry in catalog.audit().entries]
    assert (actions.count("login"), actions.count("logout")) == (5, 1)
