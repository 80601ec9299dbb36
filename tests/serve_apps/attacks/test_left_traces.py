"""What refusals, logins and downloads leave in the audit log."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from loray.bases.registry import BaseModel
from loray.catalog.audit_chain import Origin, coming_from
from tests.serve_apps.isolation.site import SECRET, Site, site

VERSION = "/adapters/{name}/versions/{version}/download"


@pytest.fixture
def made(tiny_base: Callable[..., BaseModel], tmp_path: object) -> Iterator[Site]:
    with site(tiny_base(), tmp_path) as made:  # type: ignore[arg-type]
        yield made


def test_refusals_are_counted_and_told_to_whom_they_concern(made: Site) -> None:
    unknown = [made.api.ask("GET /keys", SECRET, f"sk-lr-{number:043}") for number in range(10)]
    assert {answer.status_code for answer in unknown} == {401}
    known = [made.api.ask("GET /keys", SECRET, made.keys["acme infer"]) for _ in range(3)]
    assert {answer.status_code for answer in known} == {403}
    made.api.client.__exit__(None, None, None)  # what is not written yet is written when the server ends
    try:
        found = made.catalog.audit.page(action="refuse").items
    finally:
        made.api.client.__enter__()
    assert sorted((e.actor.partition(" (")[0], e.tenant, e.subject, e.detail["count"]) for e in found) == [
        ("acme infer", "acme", "manage_own", 3),
        ("unknown", "", "manage_own", 10),
    ]
    assert {e.address for e in found} == {"testclient"}
    assert {e.tenant: e.request_id for e in found} == {
        "acme": known[0].headers["x-request-id"],
        "": unknown[0].headers["x-request-id"],
    }
    assert made.catalog.audit.verify().num_entries > 2
    told = made.api.ask("GET /audit", SECRET, made.keys["acme publish"]).json()["items"]
    assert {entry["detail"].get("count") for entry in told if entry["action"] == "refuse"} == {3}


def test_kinds_of_refusals_are_few(made: Site) -> None:
    for number in range(300):
        with coming_from(Origin(f"10.0.{number // 256}.{number % 256}")):
            made.fakes.access._note_refused("infer", {})
    assert len(made.fakes.access._refused) == 101
    assert sum(refusals.num_requests for refusals in made.fakes.access._refused.values()) == 300


def test_downloads_and_logins_are_noted(made: Site) -> None:
    for name in (f"GET {VERSION}", f"GET /console{VERSION}"):
        made.api.ask(name, SECRET, made.keys["acme publish"])
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    logged_in = made.api.client.post("console/login", content=f"key={made.keys['acme train']}", headers=form)
    assert logged_in.status_code in (200, 303), logged_in.text
    found = [e for e in made.catalog.audit.page().items if e.action in ("download", "login")]
    assert [(e.action, e.subject, e.tenant, e.actor.partition(" (")[0]) for e in found] == [
        ("login", "console", "acme", "acme train"),
        ("download", f"{SECRET.model}@1", "acme", "acme publish"),
        ("download", f"{SECRET.model}@1", "acme", "acme publish"),
    ]
    assert {e.address for e in found} == {"testclient"}


@pytest.mark.parametrize("given", [None, "mine-1", "x" * 129])
def test_entries_have_the_id_that_the_answer_has(made: Site, given: str | None) -> None:
    """Of routes that run in a thread of access, of a place, or of any."""
    headers = {"Authorization": f"Bearer {made.keys['admin']}"} | ({} if given is None else {"X-Request-Id": given})
    of = f"adapters/{SECRET.name}"
    for method, path, body in [
        ("PUT", f"{of}/tags/team", {"value": "gold"}),
        ("POST", "tenants", {"name": "gamma"}),
        ("GET", f"{of}/versions/1/download", None),
        ("GET", f"console/{of}/versions/1/download", None),
    ]:
        before = len(made.catalog.audit.page(limit=1000).items)
        params = {"tenant": SECRET.tenant}
        told = made.api.client.request(method, path, json=body, headers=headers, params=params).headers["x-request-id"]
        assert told == given if given == "mine-1" else told.startswith("req-")
        found = made.catalog.audit.page(limit=1000).items
        (entry,) = found[: len(found) - before]
        assert (entry.request_id, entry.address) == (told, "testclient"), path
