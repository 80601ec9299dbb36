"""The prefix cache's salts of tenants."""

from __future__ import annotations

from itertools import product

from loray.spec import cache_salt


def test_no_two_tenants_have_one_salt() -> None:
    tenants = ("default", "acme", "acme.b", "beta")
    given = (None, "s", "acme", "acme/", "acme/s", "default/", "/", "\0")
    salts = {(tenant, salt): cache_salt(tenant, salt) for tenant, salt in product(tenants, given)}
    assert len(set(salts.values())) == len(salts)
    assert (salts["default", None], salts["default", "s"]) == ("", "s")
