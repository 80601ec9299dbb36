"""API keys, tenants, the audit log's pages, and logins of the console."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa
from pydantic import ValidationError

from loray.catalog import Catalog, identity
from loray.catalog.database import reading
from loray.catalog.queries import now
from loray.errors import ConflictError, KeyNotFound, LorayError, SpecError
from loray.schemas.access import KeyChange
from loray.spec import Limits, account_of
from tests.fixtures.calls import refused


def test_a_key_is_shown_once_and_its_hash_is_kept(catalog: Catalog) -> None:
    secret, key = catalog.keys.create("ci", scopes=("publish", "infer"), limits=Limits(rpm_limit=60), models={"tone"})
    assert re.fullmatch(r"sk-lr-[A-Za-z0-9_-]{43}", secret)
    assert secret.startswith(f"sk-lr-{key.prefix}")
    assert catalog.keys.get(key.id) == key
    with reading(catalog._db.engine) as c:
        stored = repr([c.execute(sa.text(f"SELECT * FROM {t}")).all() for t in ("keys", "audit_log")])
    assert secret[len("sk-lr-") + 8 :] not in stored
    assert secret not in repr(key)


def test_a_wrong_key_is_refused(catalog: Catalog) -> None:
    wrong: list[tuple[dict[str, object], type[LorayError]]] = [
        ({"tenant": "nobody"}, KeyNotFound),
        ({"scopes": ()}, SpecError),
        ({"scopes": ("root",)}, SpecError),
        ({"alias": "no\nlines"}, SpecError),
    ]
    for given, error in wrong:
        fields = {"alias": "ci"} | given
        refused(error, "", catalog.keys.create, fields.pop("alias"), **fields)  # type: ignore[arg-type]
    assert catalog.keys.page().items == ()


@pytest.mark.parametrize("grace", [timedelta(), timedelta(hours=1)])
def test_rotation(catalog: Catalog, grace: timedelta) -> None:
    limits = Limits(tpm_limit=1000)
    secret, old = catalog.keys.create("ci", scopes=("train",), limits=limits, metadata={"team": "a"})
    other, new = catalog.keys.rotate(old.id, grace=grace)
    assert other != secret
    assert (new.id, account_of(new.id)) == (f"{old.id}_2", old.id)
    assert catalog.keys.rotate(new.id).key.id == f"{old.id}_3"
    same = {"alias", "tenant", "scopes", "limits", "metadata", "models", "expires_at"}
    assert new.model_dump(include=same) == old.model_dump(include=same)
    ended = catalog.keys.get(old.id)
    assert (ended.revoked_at is None) == bool(grace)
    assert (ended.expires_at is not None) == bool(grace)
    if not grace:
        refused(ConflictError, "", catalog.keys.rotate, old.id)


def test_changes_since_a_counter(catalog: Catalog) -> None:
    first = catalog.keys.changes()
    assert (first.keys, first.any_keys) == ((), False)
    assert [t.name for t in first.tenants] == ["default"]
    _, key = catalog.keys.create("ci")
    made = catalog.keys.changes(first.counter)
    assert ([k.key for k in made.keys], made.tenants, made.any_keys) == ([key], (), True)
    catalog.keys.record_use({key.id: datetime(2026, 1, 1, tzinfo=UTC)})
    assert catalog.keys.changes(made.counter).counter == made.counter
    assert catalog.keys.get(key.id).last_used_at == datetime(2026, 1, 1, tzinfo=UTC)
    catalog.keys.update(key.id, KeyChange(blocked=True))
    catalog.tenants.update("default", limits=Limits(max_jobs=2))
    changed = catalog.keys.changes(made.counter)
    assert [k.key.blocked for k in changed.keys] == [True]
    assert [t.limits.max_jobs for t in changed.tenants] == [2]
    catalog.keys.revoke(key.id)
    revoked = catalog.keys.changes(changed.counter)
    assert (revoked.keys[0].key.revoked_at is not None, revoked.any_keys) == (True, True)
    catalog.keys.revoke(key.id)  # as all that follows, it changes nothing
    catalog.keys.update(key.id, KeyChange(blocked=True, limits=Limits()))
    catalog.tenants.update("default", blocked=False)
    assert catalog.change_counter() == revoked.counter


def test_what_of_a_key_changes(catalog: Catalog) -> None:
    _, key = catalog.keys.create("ci", models=["tone"], limits=Limits(rpm_limit=5, tpm_limit=9), metadata={"team": "a"})
    before, soon = catalog.change_counter(), datetime.now(UTC) + timedelta(days=1)
    changed = catalog.keys.update(key.id, KeyChange(key_alias="nightly", tpm_limit=None, max_budget=7.0))
    assert (changed.alias, changed.limits, changed.models) == (
        "nightly",
        Limits(rpm_limit=5, max_budget=7.0),
        frozenset({"tone"}),
    )
    assert [k.key for k in catalog.keys.changes(before).keys] == [changed]
    changed = catalog.keys.update(key.id, KeyChange(models=None, expires=soon, metadata={}))
    assert (changed.models, changed.expires_at, changed.metadata, changed.alias) == (None, soon, {}, "nightly")
    assert catalog.keys.update(key.id, KeyChange(expires=None)).expires_at is None
    (last, *_) = catalog.audit.page(action="update_key").items
    assert (last.subject, last.detail) == (key.id, {"changed": ["expires_at"]})
    with pytest.raises(ValidationError, match="rpm_limit"):
        KeyChange(rpm_limit=-1)
    refused(KeyNotFound, "", catalog.keys.update, "key-0", KeyChange(key_alias="x"))


def test_two_keys_in_use_never_have_one_alias(catalog: Catalog) -> None:
    catalog.tenants.create("acme")
    _, first = catalog.keys.create("ci")
    refused(ConflictError, first.id, catalog.keys.create, "ci")
    catalog.keys.create("ci", tenant="acme")
    _, second = catalog.keys.create("nightly")
    with pytest.raises(ConflictError, match=f"key {first.id} of tenant default has the alias 'ci'"):
        catalog.keys.update(second.id, KeyChange(key_alias="ci"))
    assert catalog.keys.update(first.id, KeyChange(key_alias="ci")).alias == "ci"  # its own
    _, third = catalog.keys.rotate(first.id, grace=timedelta(hours=1))
    assert catalog.keys.update(third.id, KeyChange(expires=None)).alias == "ci"  # the old one goes on for an hour
    catalog.keys.update(third.id, KeyChange(key_alias="other"))
    catalog.keys.revoke(first.id, only_this=True)
    assert catalog.keys.update(second.id, KeyChange(key_alias="ci")).alias == "ci"
    refused(ConflictError, "", catalog.keys.update, third.id, KeyChange(key_alias="ci"))


def test_keys_in_pages(catalog: Catalog) -> None:
    made = [catalog.keys.create(f"key {i}").key.id for i in range(5)]
    found, cursor = [], None
    while True:
        page = catalog.keys.page(limit=2, cursor=cursor)
        found += [key.id for key in page.items]
        if (cursor := page.next) is None:
            break
    assert found == made[::-1]
    assert [k.id for k in catalog.keys.page(alias="key 3").items] == [made[3]]
    refused(SpecError, "", catalog.keys.page, cursor="key-0")


def test_tenants(catalog: Catalog) -> None:
    catalog.tenants.create("acme", Limits(max_stored_bytes=1 << 30))
    assert [t.name for t in catalog.tenants.all()] == ["acme", "default"]
    for wrong, error in {"acme": ConflictError, "a/b": SpecError, "": SpecError}.items():
        refused(error, "", catalog.tenants.create, wrong)
    refused(KeyNotFound, "", catalog.tenants.update, "nobody", blocked=True)


def test_the_audit_log_in_pages(catalog: Catalog) -> None:
    _, key = catalog.keys.create("ci")
    catalog.keys.update(key.id, KeyChange(blocked=True))
    catalog.keys.revoke(key.id)
    page = catalog.audit.page(limit=2)
    assert [e.action for e in page.items] == ["revoke_key", "update_key"]
    assert [e.action for e in catalog.audit.page(cursor=int(page.next or 0)).items] == ["create_key"]
    (entry,) = catalog.audit.page(action="create_key", subject=key.id, actor="local", tenant="default").items
    assert entry.detail["alias"] == "ci"
    assert catalog.audit.page(since=datetime.now(UTC) + timedelta(minutes=1)).items == ()
    assert catalog.audit.page(tenant="acme").items == ()


def test_a_login_ends_by_time_at_logout_and_by_number(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    began = now()

    def at(moment: timedelta) -> None:
        monkeypatch.setattr(identity, "now", lambda: began + moment)

    at(timedelta())
    catalog.logins.begin("a", "sealed a")
    catalog.logins.begin("b", "sealed b")
    at(timedelta(hours=11))
    assert catalog.logins.find("a") == "sealed a"
    at(timedelta(hours=13))
    assert (catalog.logins.find("a"), catalog.logins.find("b")) == ("sealed a", None)
    at(timedelta(hours=23))
    assert catalog.logins.find("a") == "sealed a"
    at(timedelta(hours=24, seconds=1))  # however often it was used
    assert catalog.logins.find("a") is None
    monkeypatch.setattr(identity, "MOST", 2)
    for name in "cde":
        at(timedelta(days=2, minutes=ord(name)))
        catalog.logins.begin(name, name)
    assert [catalog.logins.find(name) for name in "abcde"] == [None, None, None, "d", "e"]
    with catalog._db.engine.connect() as c:
        assert c.execute(sa.text("SELECT count(*) FROM logins")).scalar_one() == 2
    catalog.logins.end("d")
    catalog.logins.end("d")
    assert catalog.logins.find("d") is None
    actions = [entry.action for entry in catalog.audit.page().items]
    assert (actions.count("login"), actions.count("logout")) == (5, 1)
