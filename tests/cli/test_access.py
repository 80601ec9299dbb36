"""`loray keys` and `loray tenants`."""

from __future__ import annotations

import hashlib

import pytest

from loray.catalog import Catalog
from loray.settings import Settings
from tests.cli.run import Loray


def catalog() -> Catalog:
    return Catalog(Settings.from_env().catalog)


def test_keys(loray: Loray) -> None:
    assert "loray keys create" in loray("keys", "ls").out
    made = loray("keys", "create", "ci", "--scope", "publish", "--scope", "infer", "--rpm", 60, "--expires", "90d")
    assert made.code == 0
    secret = made.out.strip()
    assert secret.startswith("sk-lr-")
    assert "shown this once" in made.err
    (key,) = loray("keys", "ls", "--json").json
    assert (key["key_alias"], key["scopes"], key["rpm_limit"]) == ("ci", ["infer", "publish"], 60)
    assert key["expires"] is not None
    listed = loray("keys", "ls").out
    assert secret[:14] in listed
    assert secret not in listed + loray("keys", "ls", "--json").out
    rotated = loray("keys", "rotate", "ci", "--json").json
    assert rotated["key"] != secret
    assert loray("keys", "block", rotated["id"]).out.endswith("is blocked\n")
    assert catalog().keys.get(rotated["id"]).blocked
    assert loray("keys", "block", "ci", "--off").out.endswith("passes again\n")
    assert loray("keys", "revoke", "ci").code == 0
    assert [key["revoked_at"] is None for key in loray("keys", "ls", "--all", "--json").json] == [False] * 2
    assert loray("keys", "ls", "--json").json == []
    assert "no key 'ci' in use" in loray("keys", "revoke", "ci").err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--tenant", "nobody"), "loray tenants create nobody"),
        (("--expires", "soon"), "not a duration"),
        (("--rpm", "-1"), "rpm_limit"),
    ],
)
def test_wrong_keys(loray: Loray, args: tuple[str, ...], said: str) -> None:
    assert said in loray("keys", "create", *args).failed


def test_a_key_of_the_deployment(loray: Loray) -> None:
    made = loray("keys", "create", "--static", "--json").json
    assert hashlib.sha256(made["key"].encode()).hexdigest() == made["sha256"]
    assert loray("keys", "create", "--static").out.startswith("LORAY_API_KEY=sk-lr-")
    assert catalog().keys.page().items == ()


def test_tenants(loray: Loray) -> None:
    assert loray("tenants", "create", "acme", "--stored-bytes", "2GiB", "--jobs", 3).code == 0
    assert loray("tenants", "set", "acme", "--jobs", 4, "--blocked").out == "acme: 2.1 GB stored, 4 jobs, blocked\n"
    acme = loray("tenants", "ls", "--json").json[0]
    assert (acme["max_stored_bytes"], acme["max_jobs"], acme["blocked"]) == (2 << 30, 4, True)
    assert loray("tenants", "set", "acme", "--no-limits", "--unblocked").out == "acme: no limits\n"
    assert "acme" in loray("tenants", "ls").out
    assert "tenant 'nobody'" in loray("tenants", "set", "nobody", "--jobs", 1).err
