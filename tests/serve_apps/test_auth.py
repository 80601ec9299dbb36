"""Keys in front of the gateway and of the catalog's API: wrong ones in great numbers, those kept on disk, web pages."""

from __future__ import annotations

import os
import secrets
import time
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path

import pytest
from fastapi import FastAPI

from loray.catalog import Catalog
from loray.catalog.snapshot_file import KeysFile
from loray.errors import CatalogError, LorayError, PermissionDenied, Unauthenticated
from loray.policy import auth as policy
from loray.policy.auth import KeyRing
from loray.schemas.access import KeyChange
from loray.spec import OPERATOR, Limits, Principal
from serve_apps import auth as door
from serve_apps.auth import HEADERS, REFRESH_S, Authenticator, Permissions, refuse_strangers
from serve_apps.catalog_watch import CatalogWatcher
from tests.fixtures.access import METRICS, STATIC, Site, bearer, code_of
from tests.fixtures.asking import eventually
from tests.fixtures.catalogs import sqlite_catalog
from tests.fixtures.keys import access_of

SiteOf = Callable[..., Site]
JSON = {"Content-Type": "application/json"}


def test_what_is_said_without_a_good_key(site_of: SiteOf) -> None:
    site = site_of()
    asked = ((site.gateway, "/v1/models", "invalid_api_key"), (site.api, "adapters", "unauthenticated"))
    for client, path, kind in asked:
        for headers in ({}, bearer("sk-lr-" + "x" * 43), {"Authorization": "Basic eDp5"}):
            response = client.get(path, headers=headers)
            assert code_of(response) == (401, kind)
            assert response.headers["www-authenticate"] == "Bearer"


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
        assert "nothing" not in path or answer.json()["error"]["message"] == "Invalid URL (GET /nothing)"
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


def test_a_key_that_is_blocked(site_of: SiteOf) -> None:
    site = site_of()
    key = site.key("infer")
    newest = site.catalog.keys.page().items[0]
    site.catalog.keys.update(newest.id, KeyChange(blocked=True))
    site.refresh()
    assert code_of(site.complete(key)) == (403, "permission_denied")
    assert code_of(site.api.get("adapters", headers=key)) == (403, "permission-denied")
    site.catalog.keys.update(newest.id, KeyChange(blocked=False))
    site.catalog.tenants.update("default", blocked=True)
    site.refresh()
    assert code_of(site.complete(key)) == (403, "permission_denied")


def test_a_revoked_key_is_refused_by_running_servers(site_of: SiteOf) -> None:
    assert REFRESH_S <= 1  # and the time of one query: two seconds are promised
    site = site_of()
    key = site.key("infer")
    assert site.complete(key).status_code == 200
    site.catalog.keys.revoke(site.catalog.keys.page().items[0].id)
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
    site.catalog.keys.revoke(site.catalog.keys.page().items[0].id)
    site.refresh()
    assert site.complete({}).status_code == 401  # the last revocation opens nothing
    assert site.complete(key).status_code == 401
    assert site.gateway.get("/v1/models", headers=site.key("infer") | {"Host": "proxy.example"}).status_code == 200


def test_tenants_are_named_by_keys_that_may(site_of: SiteOf) -> None:
    site = site_of()
    site.catalog.tenants.create("acme", Limits(min_priority=-5))
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
    assert site.catalog.keys.page().items[0].last_used_at is None  # once a minute at most
    site.gateway.__exit__()
    used = site.catalog.keys.page().items[0].last_used_at
    assert used is not None
    assert used.second == 0
    site.gateway.__enter__()


KEPT_BY = [module.__file__ for module in (policy, door)]


def wrong_key() -> str:
    return "sk-lr-" + secrets.token_urlsafe(32)


def test_right_keys_are_served_beside_a_flood_of_wrong_ones(site_of: SiteOf) -> None:
    site = site_of()
    key = site.key("infer")
    for _ in range(20):
        refused = [site.complete(bearer(wrong_key())) for _ in range(20)]
        refused += [site.api.get("adapters", headers=bearer(wrong_key())) for _ in range(5)]
        assert {answer.status_code for answer in refused} == {401}
        assert site.complete(key).status_code == 200
        assert site.api.get("adapters", headers=key).status_code == 200
    assert len(site.engines.requests) == 20


def kept_bytes() -> int:
    """Allocated by the modules of keys, and alive."""
    found = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, name) for name in KEPT_BY])
    return sum(trace.size for trace in found.traces)


async def test_the_memory_of_keys_is_bounded(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/catalog.db"
    with closing(Catalog(url)) as catalog:
        right = catalog.keys.create("ci").secret

    async def ask(access: Authenticator, secret: str) -> None:
        await access.admit("POST", "infer", {"authorization": f"Bearer {secret}"})

    async def flood(access: Authenticator, number: int) -> None:
        for _ in range(number):
            with pytest.raises(Unauthenticated):
                await ask(access, wrong_key())

    access = access_of(url, host="0.0.0.0")
    await access.start()
    await ask(access, right)
    tracemalloc.start()
    try:
        await flood(access, 100)
        before = kept_bytes()
        await flood(access, 3000)
        await ask(access, right)
        after = kept_bytes()
    finally:
        tracemalloc.stop()
        await access.stop()
    assert after <= before + 16_384, "each of 3,000 wrong keys has left something"


class Keys:
    """A catalog that can be away, and the file of one home."""

    def __init__(self, folder: Path) -> None:
        self.url = sqlite_catalog(folder)
        self.file = KeysFile(folder / "keys.jsonl", self.url)
        self.is_away = False

    def open(self) -> Catalog:
        if self.is_away:
            raise CatalogError("the database is away")
        return Catalog(self.url)

    def server(self, max_age_s: float = 3600.0) -> Authenticator:
        follower = CatalogWatcher(self.open)
        return Authenticator(KeyRing(max_age_s=max_age_s), follower, host="0.0.0.0", kept=self.file)


@pytest.fixture
def kept_keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)


async def admitted(access: Authenticator, *secrets: str, refreshes: int = 1) -> list[Principal | Exception]:
    with closing(access):
        for _ in range(refreshes):
            await access.refresh()
        answers: list[Principal | Exception] = []
        for secret in secrets:
            try:
                principal = await access.admit("POST", "infer", {"authorization": f"Bearer {secret}"})
                assert principal is not None
                answers.append(principal)
            except (CatalogError, Unauthenticated) as e:
                answers.append(e)
        if access._keeper._writing is not None:
            await access._keeper._writing
        return answers


async def test_a_server_starts_while_the_database_is_away(kept_keys: Keys) -> None:
    with closing(kept_keys.open()) as catalog:
        catalog.tenants.create("acme")
        good, key = catalog.keys.create("ci", tenant="acme", scopes=("infer",))
        revoked, other = catalog.keys.create("old", scopes=("infer",))
        catalog.keys.revoke(other.id)
    assert len(await admitted(kept_keys.server())) == 0  # the first server writes the file
    assert good not in kept_keys.file.path.read_text()
    assert kept_keys.file.path.stat().st_mode & 0o077 == 0
    kept_keys.is_away = True
    first, second = await admitted(kept_keys.server(), good, revoked)
    assert isinstance(first, Principal)
    assert (first.tenant, first.key_id) == ("acme", key.id)
    assert isinstance(second, Unauthenticated)
    (too_old,) = await admitted(kept_keys.server(max_age_s=0.0), good)
    assert isinstance(too_old, CatalogError)


async def test_what_the_database_says_replaces_what_was_kept(kept_keys: Keys) -> None:
    with closing(kept_keys.open()) as catalog:
        good, key = catalog.keys.create("ci", scopes=("infer",))
    await admitted(kept_keys.server())
    with closing(kept_keys.open()) as catalog:
        catalog.keys.revoke(key.id)
    kept_keys.is_away = True
    with closing(kept_keys.server()) as server:
        await server.refresh()
        assert (await server.admit("POST", "infer", {"authorization": f"Bearer {good}"})) is not None
        kept_keys.is_away = False
        await server.refresh()
        with pytest.raises(Unauthenticated):
            await server.admit("POST", "infer", {"authorization": f"Bearer {good}"})
        assert server._keeper._writing is not None
        await server._keeper._writing
    kept = kept_keys.file.read()
    assert kept is not None
    assert [found.key.id for found in kept.state.keys] == []


@pytest.mark.parametrize(
    "harm",
    [
        lambda path: path.write_text("{"),
        lambda path: path.write_text("[]"),
        lambda path: path.write_text(path.read_text().replace('"format":4', '"format":3')),
        lambda path: path.write_text(path.read_text().replace('"catalog":"', '"catalog":"0')),
        lambda path: path.write_text(path.read_text().replace('"infer"', '"admin"')),
        lambda path: path.chmod(0o644),
        lambda path: path.unlink(),
    ],
)
async def test_a_file_that_cannot_be_used(kept_keys: Keys, harm: Callable[[Path], object]) -> None:
    with closing(kept_keys.open()) as catalog:
        good, _ = catalog.keys.create("ci", scopes=("infer",))
    await admitted(kept_keys.server())
    harm(kept_keys.file.path)
    kept_keys.is_away = True
    (answer,) = await admitted(kept_keys.server(), good)
    assert isinstance(answer, CatalogError)


async def test_keys_from_disk_are_as_old_as_they_are(kept_keys: Keys) -> None:
    key = Catalog(kept_keys.url).keys.create("ci", scopes=("infer",)).secret
    with closing(kept_keys.server()) as before:
        assert before.age_s == float("inf")
        assert isinstance((await admitted(before, key))[0], Principal)
        assert 0 <= before.age_s < 60
    kept_keys.is_away = True
    at = time.time() - 600
    os.utime(kept_keys.file.path, (at, at))
    with closing(kept_keys.server()) as after:
        assert isinstance((await admitted(after, key))[0], Principal)
        assert 600 <= after.age_s < 660
        kept_keys.is_away = False
        await admitted(after, refreshes=2)
        assert 0 <= after.age_s < 60


HOST = {"host": "localhost:8000"}
SENT = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        ("GET", HOST),
        ("GET", {"host": "127.0.0.1:8000"}),
        ("GET", {"host": "127.8.9.10"}),
        ("GET", {"host": "[::1]:8000"}),
        ("GET", {"host": "LOCALHOST"}),
        ("GET", {"host": "ours:80"}),
        ("GET", {}),
        ("GET", HOST | {"origin": "http://evil.example"}),  # it cannot read the answer
        ("POST", HOST | SENT),
        ("POST", HOST | {"content-type": "application/yaml; charset=utf-8"}),
        ("POST", HOST | SENT | {"origin": "http://localhost:8000", "sec-fetch-site": "same-origin"}),
        ("POST", HOST | {"authorization": "Bearer none"}),
        ("POST", HOST | {"content-type": "multipart/form-data; boundary=b", "idempotency-key": "k"}),
        ("PUT", HOST),
        ("DELETE", HOST),
    ],
)
def test_what_may_pass(method: str, headers: dict[str, str]) -> None:
    refuse_strangers(method, headers, frozenset({"ours"}))


@pytest.mark.parametrize(
    ("method", "headers"),
    [
        *(("GET", {"host": host}) for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "", "[")),
        *(("GET", {"host": host}) for host in ("127.0.0.1@evil.example", "evil.example@127.0.0.1", "10.0.0.1")),
        *(("POST", HOST | SENT | {"origin": o}) for o in ("null", "http://evil.example", "http://localhost:3000", "x")),
        ("POST", HOST | SENT | {"sec-fetch-site": "cross-site"}),
        ("DELETE", HOST | {"origin": "http://evil.example"}),
        ("POST", HOST),  # rollback and stop need no body
        *(
            ("POST", HOST | {"content-type": kind})
            for kind in ("text/plain", "Text/Plain;charset=UTF-8", "application/x-www-form-urlencoded")
        ),
        ("POST", HOST | {"content-type": "multipart/form-data; boundary=b"}),
    ],
)
def test_what_is_refused(method: str, headers: dict[str, str]) -> None:
    with pytest.raises(PermissionDenied):
        refuse_strangers(method, headers, frozenset({"ours"}))


class Read(Mapping[str, str]):
    """Headers, with the names of those that were read."""

    def __init__(self, headers: dict[str, str]) -> None:
        self._headers = headers
        self.names: set[str] = set()

    def __getitem__(self, name: str) -> str:
        self.names.add(name)
        return self._headers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._headers)

    def __len__(self) -> int:
        return len(self._headers)


@pytest.mark.parametrize("headers", [{}, HOST, HOST | SENT, {"authorization": "Bearer x"}, {"x-tenant-id": "acme"}])
@pytest.mark.parametrize("ring", [KeyRing(), KeyRing(static={b"0" * 32: OPERATOR})])
async def test_the_middleware_keeps_what_is_read(headers: dict[str, str], ring: KeyRing, tmp_path: Path) -> None:
    given = Read(headers)
    access = access_of(sqlite_catalog(tmp_path), ring=ring)
    for method in ("GET", "POST"):
        with suppress(LorayError):
            await access.admit(method, "infer", given)
    access.close()
    assert given.names
    assert given.names <= HEADERS
