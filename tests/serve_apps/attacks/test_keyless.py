"""A server that needs no key answers this machine alone, whatever stands before it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from loray.settings import Settings
from loray.spec import FleetSpec, ServeSpec
from serve_apps import serve_internals
from serve_apps.api.app import ApiSpec
from serve_apps.auth import open_auth
from serve_apps.serve_internals import reachable_host
from tests.fixtures.access import Site, code_of


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("Forwarded", "for=192.0.2.60;proto=http"),
        ("X-Forwarded-For", "203.0.113.9"),
        ("X-Forwarded-Host", "loray.example"),
        ("X-Forwarded-Proto", "https"),
        ("X-Real-IP", "203.0.113.9"),
        ("Via", "1.1 proxy"),
    ],
)
def test_what_a_proxy_sends_on_needs_a_key(site_of: Callable[..., Site], name: str, value: str) -> None:
    site = site_of("127.0.0.1")
    assert site.complete({}).status_code == 200
    refused = site.complete({name: value})
    assert code_of(refused) == (403, "permission_denied")
    assert f"the header {name.lower()} says that a proxy" in refused.text
    assert code_of(site.api.get("keys", headers={name: value})) == (403, "permission-denied")
    assert site.complete(site.key("infer") | {name: value}).status_code == 200


@pytest.mark.parametrize("stated", ["127.0.0.1", "localhost", "0.0.0.0"])
@pytest.mark.parametrize("real", ["127.0.0.1", "::1", "0.0.0.0", "::", "10.1.2.3"])
def test_both_hosts_must_be_loopback(monkeypatch: pytest.MonkeyPatch, stated: str, real: str) -> None:
    monkeypatch.setattr(serve_internals, "_host_of_serve", lambda: real)
    access = open_auth(Settings.from_env({}), reachable_host(stated))
    assert access._is_local == (stated != "0.0.0.0" and real in ("127.0.0.1", "::1"))
    access.close()


def test_the_catalog_s_application_trusts_no_more_than_the_gateway() -> None:
    assert ApiSpec().host == FleetSpec.of(ServeSpec()).host == "127.0.0.1"
