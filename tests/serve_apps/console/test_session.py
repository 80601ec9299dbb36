"""Login and logout, what a session may do, and what a page of another site cannot."""

from __future__ import annotations

import re
from contextlib import closing

import pytest
import sqlalchemy as sa

from loray.catalog.schema import logins
from tests.fixtures.api import Api
from tests.fixtures.keys import access_of
from tests.serve_apps.console.site import HTMX, ROOT, URL, ConsoleSite


def test_without_keys_no_login_is_needed(console: ConsoleSite) -> None:
    page = console.get()
    assert page.status_code == 200
    assert "Log out" not in page.text
    assert console.get("/").status_code in (200, 307)


def test_a_key_opens_a_session_until_logout(console: ConsoleSite) -> None:
    key = console.key("admin")
    asked = console.get()
    assert (asked.status_code, 'name="key"' in asked.text, "smollm2" in asked.text) == (401, True, False)
    answer = console.log_in(key)
    assert (answer.status_code, answer.headers["location"]) == (303, ROOT)
    cookie = answer.headers["set-cookie"]
    assert all(word in cookie for word in ("HttpOnly", "SameSite=strict", f"Path={ROOT}"))
    assert key not in cookie
    page = console.get()
    assert (page.status_code, "Log out" in page.text, key in page.text) == (200, True, False)
    assert console.post("/logout").headers["hx-redirect"] == f"{ROOT}/login"
    assert console.get().status_code == 401


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_login_over_tls_is_never_sent_without(console: ConsoleSite, scheme: str) -> None:
    """A proxy before the console says which it was."""
    console.http.headers["X-Forwarded-Proto"] = scheme
    cookie = console.log_in(console.key("admin")).headers["set-cookie"]
    assert ("Secure" in cookie) == (scheme == "https")


@pytest.mark.parametrize("key", ["", "sk-lr-" + "A" * 43, "\x00", "<script>"])
def test_a_wrong_key_is_refused(console: ConsoleSite, key: str) -> None:
    console.key("admin")
    answer = console.log_in(key)
    assert (answer.status_code, "set-cookie" in answer.headers) == (401, False)
    assert "the API key is not valid" in answer.text


def test_a_revoked_key_ends_its_session(console: ConsoleSite) -> None:
    console.log_in(console.key("admin"))
    assert console.get().status_code == 200
    console.catalog.keys.revoke(console.catalog.keys.page(limit=1).items[0].id)
    assert console.get().status_code == 401


def test_changes_repeat_the_token_of_their_session(console: ConsoleSite) -> None:
    console.log_in(console.key("admin"))
    path = "/adapters/tone/aliases/prod?version=2"
    for wrong in ({"X-CSRF-Token": ""}, {"X-CSRF-Token": "A" * 43}):
        assert console.post(path, **wrong).status_code == 403
    assert console.http.post(URL + path, headers=HTMX).status_code == 403
    assert console.catalog.aliases.get("tone", "prod").version == 1
    assert console.post(path).status_code == 204
    assert console.catalog.aliases.get("tone", "prod").version == 2


def test_without_keys_another_site_changes_nothing(console: ConsoleSite) -> None:
    for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://evil.example"}, {"X-CSRF-Token": "no"}):
        assert console.post("/adapters/tone/aliases/prod?version=2", **headers).status_code == 403, headers
    rebound = console.http.get(URL, headers={"Host": "evil.example"})
    assert (rebound.status_code, "tone" in rebound.text) == (403, False)


def test_another_site_logs_nobody_in(console: ConsoleSite) -> None:
    key = console.key("admin")
    for headers in ({"Sec-Fetch-Site": "cross-site"}, {"Origin": "http://evil.example"}):
        answer = console.http.post(f"{URL}/login", data={"key": key}, headers=headers)
        assert (answer.status_code, "set-cookie" in answer.headers) == (403, False)


def test_the_cookie_opens_pages_alone(console: ConsoleSite) -> None:
    value = console.log_in(console.key("admin")).cookies["loray_session"]
    answer = console.http.get("http://test/api/v1/adapters", headers={"Cookie": f"loray_session={value}"})
    assert answer.status_code == 401


def test_pages_run_nothing_inline_and_ask_nobody_else(console: ConsoleSite) -> None:
    sections = ("", "/adapters", "/keys", "/usage", "/jobs", "/playground", "/serving", "/uploads", "/jobs/new")
    for path in (*sections, "/login", "/adapters/tone", "/adapters/tone/versions/1"):
        page = console.get(path)
        assert page.headers["content-security-policy"].startswith("default-src 'self'; ")
        assert not re.search(r"<script(?![^>]* src=)|<style|\sstyle=|\son[a-z]+=", page.text), path
        for address in re.findall(r'(?:src|href|action)="([^"]+)"', page.text):
            assert address.startswith(("/api/v1/console", "#")), address
        for name in re.findall(r"/static/([^\"]+)", page.text):
            assert console.get(f"/static/{name}").status_code == 200


def test_errors_are_pages_and_messages(console: ConsoleSite) -> None:
    page = console.get("/adapters/nothing")
    assert (page.status_code, "<main" in page.text) == (404, True)
    assert "no adapter &#39;nothing&#39;" in page.text
    part = console.http.get(f"{URL}/adapters/nothing", headers={"HX-Request": "true"})
    assert (part.status_code, "<main" in part.text, "no adapter" in part.text) == (404, False, True)
    assert console.get("/adapters/tone", before="x").status_code == 422
    assert console.get("/static/..%2fsite.py").status_code in (403, 404)


def test_every_process_of_the_api_knows_a_login(console: ConsoleSite) -> None:
    """As behind a load balancer that sends each request to another one."""
    key = console.key("admin")
    value = console.log_in(key).cookies["loray_session"]
    url = console.settings.catalog
    with closing(Api(console.settings.home, url, access_of(url, host="0.0.0.0"))) as other:
        cookie = {"Cookie": f"loray_session={value}"}
        page = other.http.get(URL, headers=cookie)
        assert (page.status_code, "Log out" in page.text) == (200, True)
        token = re.search(r"X-CSRF-Token[^a-f0-9]+([a-f0-9]{64})", page.text)
        assert token is not None
        assert other.http.post(f"{URL}/logout", headers=cookie | {"X-CSRF-Token": token[1]}).status_code == 204
        assert other.http.get(URL, headers=cookie).status_code == 401
    assert console.get().status_code == 401


def test_the_database_alone_opens_no_login(console: ConsoleSite) -> None:
    key = console.key("admin")
    value = console.log_in(key).cookies["loray_session"]
    with console.catalog._db.engine.connect() as c:
        (row,) = c.execute(sa.select(logins)).all()
    assert key not in repr(row)
    assert value not in repr(row)
    assert bytes.fromhex(row.sealed) != key.encode()
    for guess in (row.cookie_sha256, row.sealed, value[:-1]):
        page = console.http.get(URL, headers={"Cookie": f"loray_session={guess}"})
        assert page.status_code == (401 if guess != value else 200)
