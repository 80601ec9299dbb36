"""What refusals, logins and downloads leave in the audit log."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from loray.bases.registry import BaseModel
from tests.serve_apps.isolation.site import SECRET, Site, site

VERSION = "/adapters/{name}/versions/{version}/download"


@pytest.fixture
def made(tiny_base: Callable[..., BaseModel], tmp_path: object) -> Iterator[Site]:
    with site(tiny_base(), tmp_path) as made:  # type: ignore[arg-type]
        yield made


def test_refusals_are_counted_and_told_to_whom_they_concern(made: Site) -> None:
    for number in range(10):
        assert made.api.ask("GET /keys", SECRET, f"sk-lr-{number:043}").status_code == 401
    for _ in range(3):
        assert made.api.ask("GET /keys", SECRET, made.keys["acme infer"]).status_code == 403
    made.api.client.__exit__(None, None, None)  # what is not written yet is written when the server ends
    try:
        found = made.catalog.audit(action="refuse").entries
    finally:
        made.api.client.__enter__()
    assert sorted((e.actor.partition(" (")[0], e.tenant, e.subject, e.detail["count"]) for e in found) == [
        ("acme infer", "acme", "manage_own", 3),
        ("unknown", "", "manage_own", 10),
    ]
    assert {e.address for e in found} == {"testclient"}
    assert made.catalog.verify_audit().num_entries > 2
    told = made.api.ask("GET /audit", SECRET, made.keys["acme publish"]).json()["items"]
    assert {entry["detail"].get("count") for entry in told if entry["action"] == "refuse"} == {3}


def test_kinds_of_refusals_are_few(made: Site) -> None:
    for number in range(300):
        made.fakes.access._note_refused("infer", {}, f"10.0.{number // 256}.{number % 256}")
    assert len(made.fakes.access._refused) == 101
    assert sum(made.fakes.access._refused.values()) == 300


def test_downloads_and_logins_are_noted(made: Site) -> None:
    for name in (f"GET {VERSION}", f"GET /console{VERSION}"):
        made.api.ask(name, SECRET, made.keys["acme publish"])
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    logged_in = made.api.client.post("console/login", content=f"key={made.keys['acme train']}", headers=form)
    assert logged_in.status_code in (200, 303), logged_in.text
    found = [e for e in made.catalog.audit().entries if e.action in ("download", "login")]
    assert [(e.action, e.subject, e.tenant, e.actor.partition(" (")[0]) for e in found] == [
        ("login", "console", "acme", "acme train"),
        ("download", f"{SECRET.model}@1", "acme", "acme publish"),
        ("download", f"{SECRET.model}@1", "acme", "acme publish"),
    ]
    assert {e.address for e in found} == {"testclient"}
