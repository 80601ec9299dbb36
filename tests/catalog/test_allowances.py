"""What a tenant may keep, on both databases: names, versions, bytes and templates, up to each limit and no further."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from datetime import timedelta

import pytest
import sqlalchemy as sa

from loray.catalog import Catalog, allowances
from loray.catalog.schema import adapters
from loray.errors import CatalogFull, LimitExceeded
from loray.spec import DEFAULT_KEEP_DELETED_S, AdapterManifest, Limits, Principal
from tests.fixtures.calls import at_once, refused
from tests.fixtures.versions import digest, manifest

KEY = Principal(tenant="acme", key_id="key-1", scopes=frozenset({"publish"}))
DRIVER = Principal(tenant="acme", scopes=frozenset({"publish", "promote", "train"}))


@pytest.fixture
def acme(catalog: Catalog) -> Catalog:
    catalog.tenants.create("acme")
    return catalog.view(KEY)


def register(catalog: Catalog, name: str, number: int, **fields: object) -> None:
    catalog.adapters.record_upload(digest(number))
    catalog.adapters.register(name, digest(number), manifest(number).model_copy(update=fields))


def templated(text: str) -> dict[str, object]:
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    return {"chat_template": text, "files": {AdapterManifest.TEMPLATE_FILE: sha256}}


def test_two_writers_at_once_reach_a_limit_and_do_not_pass_it(url: str) -> None:
    catalogs = [Catalog(url), Catalog(url)]
    catalogs[0].tenants.create("acme", Limits(max_adapters=10))

    def write(i: int) -> int:
        mine, registered = catalogs[i].view(KEY), 0
        for number in range(8):
            with suppress(LimitExceeded):
                register(mine, f"n{i}-{number}", number)
                registered += 1
        return registered

    num_written = sum(at_once(2, write))
    names = [entry.name for entry in catalogs[0].snapshot().models()]
    assert num_written == len(names) == 10
    register(catalogs[0].view(KEY), names[0].removeprefix("acme/"), 9)  # a version more
    for catalog in catalogs:
        catalog.close()


def test_the_smaller_limit_of_key_and_tenant_counts(catalog: Catalog) -> None:
    catalog.tenants.create("acme", Limits(max_adapters=2))
    limited = catalog.view(KEY.model_copy(update={"limits": Limits(max_adapters=1)}))
    register(limited, "a", 1)
    refused(LimitExceeded, "", register, limited, "b", 1)
    register(catalog.view(KEY), "b", 1)
    for principal in (KEY, DRIVER):
        refused(LimitExceeded, "3 adapters, and may have 2", register, catalog.view(principal), "c", 1)


def test_what_nobody_has_limited_binds_keys_alone(acme: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job was admitted when it was submitted, and an administrator knows what they do."""
    monkeypatch.setattr(allowances, "DEFAULT_MAX_ADAPTERS", 1)
    monkeypatch.setattr(allowances, "MAX_VERSIONS", 2)
    for number in (1, 2):
        register(acme, "a", number)
    refused(LimitExceeded, "2 adapters, and may have 1", register, acme, "b", 1)
    refused(LimitExceeded, "the adapter would have 3 versions, and may have 2", register, acme, "a", 3)
    acme.adapters.register("a", digest(2), manifest(2))  # which it has
    for number, principal in enumerate((DRIVER, KEY.model_copy(update={"scopes": frozenset({"admin"})})), start=3):
        register(acme.view(principal), "a", number)
        register(acme.view(principal), f"b{number}", 1)


def test_what_is_deleted_counts_while_it_can_be_restored(catalog: Catalog) -> None:
    catalog.tenants.create("acme", Limits(max_adapters=1))
    acme = catalog.view(KEY)
    register(acme, "a", 1)
    acme.removal.delete_adapter("a")
    refused(LimitExceeded, "", register, acme, "b", 1)
    with catalog._db.engine.begin() as c:
        before = sa.select(adapters.c.deleted_at).scalar_subquery()
        long_ago = c.execute(sa.select(before)).scalar_one() - timedelta(seconds=DEFAULT_KEEP_DELETED_S + 60)
        c.execute(adapters.update().values(deleted_at=long_ago))
    register(acme, "b", 1)


@pytest.mark.parametrize(("limit", "is_allowed"), [(2999, False), (3000, True), (3001, True)])
def test_stored_bytes(catalog: Catalog, limit: int, is_allowed: bool) -> None:
    catalog.tenants.create("acme", Limits(max_stored_bytes=limit))
    acme = catalog.view(DRIVER)
    register(acme, "a", 1, nbytes=1000)
    register(acme, "same", 1, nbytes=1000)  # the store keeps it once
    if is_allowed:
        register(acme, "a", 2, nbytes=2000)
        acme.adapters.check_stored_bytes(lambda: limit - 3000)
    else:
        with pytest.raises(
            LimitExceeded, match=r"stores 1.0 kB and would store 2.0 kB more; max_stored_bytes allows 3.0 kB"
        ):
            register(acme, "a", 2, nbytes=2000)
    refused(LimitExceeded, "", acme.adapters.check_stored_bytes, lambda: limit)


def test_templates_that_differ_are_summed(acme: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allowances, "MAX_TEMPLATE_CHARACTERS_OF_TENANT", 10)
    register(acme, "a", 1, **templated("{{ a }}"))
    register(acme, "a", 2, **templated("{{ a }}"))
    register(acme, "b", 3, **templated("abc"))
    refused(LimitExceeded, "11 characters in chat templates, and may have 10", register, acme, "c", 4, **templated("d"))
    register(acme, "c", 5, **templated("{{ a }}"))


def test_nobody_publishes_where_gateways_memory_is_full_of_names(url: str) -> None:
    """A name of one version takes 1,200 bytes; what is deleted takes none."""
    catalog = Catalog(url, max_snapshot_bytes=2 * 1200 + 9 + 400)
    register(catalog, "a", 1, **templated("{{ a }}"))
    register(catalog, "b", 2)
    refused(CatalogFull, r"about 3.2 kB of each gateway's memory, and may take 2.8 kB", register, catalog, "c", 3)
    assert [entry.name for entry in catalog.snapshot().models()] == ["a", "b"]
    catalog.adapters.register("a", digest(1), manifest(1).model_copy(update=templated("{{ a }}")))  # which is there
    catalog.removal.delete_adapter("b")
    register(catalog, "c", 3)
    catalog.close()
