"""Who may do what, and keys in memory."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

import pytest

from loray.errors import CatalogError, LorayError, PermissionDenied, Unauthenticated
from loray.policy.auth import Action, KeyRing, check, check_model
from loray.spec import SCOPES, ApiKey, HashedKey, KeyChanges, Limits, Principal, Tenant
from tests.fixtures.calls import refused

NOW = datetime(2026, 1, 1, tzinfo=UTC)
# Which scopes may do what; an administrator may do all of it.
TABLE: dict[Action, str] = {
    "open": "infer publish promote train tenant_admin act_for",
    "identify": "infer publish promote train tenant_admin act_for",
    "infer": "infer",
    "batch": "infer",
    "files": "infer train",
    "session": "infer train",
    "read": "infer publish promote train",
    "download": "publish promote train",
    "publish": "publish",
    "promote": "promote",
    "train": "train",
    "follow": "train tenant_admin",
    "audit": "publish promote train tenant_admin",
    "manage_own": "tenant_admin",
    "observe": "",
    "manage": "",
}


def principal(*scopes: str, **fields: Any) -> Principal:
    return Principal(scopes=frozenset(scopes), **fields)  # type: ignore[arg-type]


def test_the_table_has_every_action() -> None:
    assert set(TABLE) == set(get_args(Action))


@pytest.mark.parametrize("action", TABLE)
@pytest.mark.parametrize("scope", [None, *SCOPES])
def test_scopes(action: Action, scope: str | None) -> None:
    allowed = action == "open" if scope is None else scope == "admin" or scope in TABLE[action].split()
    asking = None if scope is None else principal(scope)
    if allowed:
        check(asking, action)
        return
    refused(Unauthenticated if scope is None else PermissionDenied, "", check, asking, action)


def test_what_belongs_to_another_tenant() -> None:
    mine = principal("publish", "infer")
    check(mine, "publish", "default")
    refused(PermissionDenied, "", check, mine, "publish", "acme")
    check(principal("admin"), "publish", "acme")


@pytest.mark.parametrize(
    ("tenant", "models", "asked", "allowed"),
    [
        ("default", None, "tone", True),
        ("default", {"tone"}, "tone", True),
        ("default", {"tone"}, "tone@3", True),
        ("default", {"tone"}, "default/tone", True),
        ("default", {"tone@prod"}, "tone@prod", True),
        ("default", {"tone@prod"}, "tone", False),
        ("default", {"tone"}, "tones", False),
        ("default", set(), "tone", False),
        ("acme", {"tone"}, "acme/tone@1", True),
        ("acme", {"acme/tone"}, "tone", True),
        ("acme", {"tone"}, "default/tone", False),
        ("acme", {"default/tone"}, "default/tone@prod", True),
    ],
)
def test_models_of_a_key(tenant: str, models: set[str] | None, asked: str, allowed: bool) -> None:
    asking = principal("infer", tenant=tenant, models=None if models is None else frozenset(models))
    if allowed:
        check_model(asking, asked)
        return
    refused(PermissionDenied, "", check_model, asking, asked)


DEFAULT = Tenant(name="default", created_at=NOW)
ACME = Tenant(name="acme", created_at=NOW, limits=Limits(rpm_limit=7))


def hashed(secret: str, **fields: Any) -> HashedKey:
    given: dict[str, Any] = {"id": f"key-{secret[-4:]}", "prefix": secret[6:14], "alias": "a", "tenant": "default"}
    given |= {"scopes": {"infer"}, "created_by": "local", "created_at": NOW} | fields
    return HashedKey(hashlib.sha256(secret.encode()).digest(), ApiKey(**given))


def secret(end: str, prefix: str = "AbCdEfGh") -> str:
    return f"sk-lr-{prefix}{end:0>35}"


def ring(*keys: HashedKey, **fields: Any) -> KeyRing:
    return KeyRing(**fields).updated(KeyChanges(1, keys, (DEFAULT, ACME), any_keys=bool(keys)), read_at=0.0)


def ask(ring: KeyRing, secret: str, *, now: datetime = NOW, monotonic: float = 0.0) -> Principal:
    return ring.principal(secret, now=now.timestamp(), monotonic=monotonic)


def test_keys_that_share_a_prefix() -> None:
    found = ring(
        hashed(secret("1")), hashed(secret("2"), tenant="acme", scopes={"train"}), hashed(secret("3", "x" * 8))
    )
    assert ask(found, secret("1")).tenant == "default"
    other = ask(found, secret("2"))
    assert (other.tenant, other.scopes, other.key_id) == ("acme", {"train"}, "key-0002")
    assert other.tenant_limits.rpm_limit == 7


@pytest.mark.parametrize(
    "wrong", ["", "sk-", "Bearer", secret("9"), secret("1")[:-1], secret("1") + "1", "\udcff" * 49, "x" * 100_000]
)
def test_a_wrong_key(wrong: str) -> None:
    refused(Unauthenticated, "", ask, ring(hashed(secret("1"))), wrong)


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"expires_at": NOW}, Unauthenticated),
        ({"revoked_at": NOW}, Unauthenticated),
        ({"blocked": True}, PermissionDenied),
    ],
)
def test_a_key_that_is_no_longer_good(fields: dict[str, Any], error: type[LorayError]) -> None:
    good = ring(hashed(secret("1")))
    assert ask(good, secret("1"))
    ended = good.updated(KeyChanges(2, (hashed(secret("1"), **fields),), (), any_keys=True), read_at=1.0)
    refused(error, "", ask, ended, secret("1"))
    assert ended.needs_key  # so that the last revocation does not open the door


def test_a_key_ends_at_its_time() -> None:
    found = ring(hashed(secret("1"), expires_at=NOW + timedelta(seconds=10)))
    assert ask(found, secret("1"), now=NOW + timedelta(seconds=9))
    refused(Unauthenticated, "expired", ask, found, secret("1"), now=NOW + timedelta(seconds=10))


def test_the_keys_of_a_tenant_follow_it() -> None:
    found = ring(hashed(secret("1"), tenant="acme"))
    changed = ACME.model_copy(update={"limits": Limits(rpm_limit=9)})
    limited = found.updated(KeyChanges(2, (), (changed,), any_keys=True), read_at=1.0)
    assert ask(limited, secret("1")).tenant_limits.rpm_limit == 9
    blocked = found.updated(KeyChanges(2, (), (ACME.model_copy(update={"blocked": True}),), any_keys=True), read_at=1.0)
    refused(PermissionDenied, "", ask, blocked, secret("1"))


def test_without_the_database_only_the_deployments_own_keys_go_on_for_ever() -> None:
    own = Principal(actor="deployment")
    static = {hashlib.sha256(b"own").digest(): own}
    never = KeyRing(static=static)
    assert (never.was_read, never.needs_key) == (False, True)
    assert ask(never, "own", monotonic=1e9) is own
    refused(CatalogError, "", ask, never, secret("1"))
    found = ring(hashed(secret("1")), static=static, max_age_s=60.0)
    assert ask(found, secret("1"), monotonic=60.0)
    refused(CatalogError, "", ask, found, secret("1"), monotonic=60.1)
    assert ask(found, "own", monotonic=60.1) is own


def test_whether_anybody_has_a_limit_that_is_counted() -> None:
    free = KeyRing().updated(KeyChanges(1, (hashed(secret("1")),), (DEFAULT,), any_keys=True), read_at=0.0)
    assert not free.has_limits
    for limits, counted in ((Limits(max_jobs=1), False), (Limits(max_budget=0), True), (Limits(), False)):
        key = hashed(secret("1"), limits=limits)
        free = free.updated(KeyChanges(2, (key,), (), any_keys=True), read_at=1.0)
        assert free.has_limits == counted
    assert free.has_same_keys(free.confirmed(2.0))
    of_tenant = free.updated(KeyChanges(3, (), (ACME,), any_keys=True), read_at=2.0)
    assert of_tenant.has_limits
    assert not of_tenant.has_same_keys(free)


def test_a_key_of_the_catalog_is_no_key_of_the_deployment() -> None:
    """Though a server was started with it in LORAY_API_KEY: it keeps its scopes, and can be revoked."""
    mine = hashed(secret("1"), tenant="acme")
    static = {mine.sha256: Principal(actor="deployment")}
    assert ask(KeyRing(static=static), secret("1")).is_admin  # before the catalog was read
    known = ring(mine, static=static)
    assert (ask(known, secret("1")).scopes, ask(known, secret("1")).tenant) == ({"infer"}, "acme")
    gone = known.updated(KeyChanges(2, (hashed(secret("1"), revoked_at=NOW),), (), any_keys=True), read_at=1.0)
    kept = KeyRing(static=static).updated(gone.state, read_at=1.0)  # as a server has it from the file of the last one
    for one in (gone, kept, ring(hashed(secret("1"), revoked_at=NOW), static=static)):
        refused(Unauthenticated, "", ask, one, secret("1"))


def test_acting_for_another_tenant() -> None:
    found = ring()
    proxy = principal("infer", "tenant_admin", "admin", "act_for")
    acting = found.acting_for(proxy, "acme")
    assert (acting.tenant, acting.scopes, acting.tenant_limits.rpm_limit) == ("acme", {"infer"}, 7)
    for asking, tenant in ((principal("infer", "admin"), "acme"), (proxy, "nobody")):
        refused(PermissionDenied, "", found.acting_for, asking, tenant)
    blocked = found.updated(KeyChanges(2, (), (ACME.model_copy(update={"blocked": True}),), any_keys=True), read_at=1.0)
    refused(PermissionDenied, "", blocked.acting_for, proxy, "acme")
