"""Usage over HTTP and in the command: one's own, and for administrators everybody's."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from loray.cli.main import cli
from loray.spec import Principal
from serve_apps.api.site import create_app
from tests.fixtures.figures import event
from tests.serve_apps.api.fakes import Api, InProcess, mounted
from tests.serve_apps.api.test_adapters import problem
from tests.serve_apps.keys import Given


@pytest.fixture
def used(api: Api) -> Api:
    now = datetime.now(UTC)
    api.catalog.record_usage(
        [
            event(1, created_at=now),
            event(2, created_at=now, key_id="k2"),
            event(3, created_at=now, tenant="other", model="tone", key_id=None),
        ]
    )
    return api


def rows(api: Api, **params: Any) -> list[tuple[Any, ...]]:
    items = api.http.get("/usage", params=params).raise_for_status().json()["items"]
    return [(row["tenant"], row["key_id"], row["num_requests"], row["num_prompt_tokens"]) for row in items]


def test_an_administrator_sees_all(used: Api) -> None:
    assert rows(used) == [(None, None, 3, 30)]
    assert rows(used, group_by="tenant") == [("acme", None, 2, 20), ("other", None, 1, 10)]
    assert rows(used, tenant="acme", group_by=["key", "tenant"]) == [("acme", "k1", 1, 10), ("acme", "k2", 1, 10)]
    assert rows(used, since="2999-01-01") == [(None, None, 0, 0)]
    problem(used.http.get("/usage", params={"since": "0001-01-01T00:00:00+09:00"}), 422)
    assert rows(used, since="0001-01-01T00:00:00", until="9999-12-31T23:59:59") == [(None, None, 3, 30)]
    first = used.http.get("/usage", params={"group_by": "tenant", "limit": 1})
    second = used.http.get(f"http://test{first.links['next']['url']}").json()
    assert [row["tenant"] for row in second["items"]] == ["other"]
    assert second["next"] is None
    for number in ("274", "1700000000", "1.7e9", "-1"):  # seconds since 1970, as far as one can guess
        problem(used.http.get("/usage", params={"until": number}), 422)
        problem(used.http.get("/audit", params={"since": number}), 422)
    problem(used.http.post("/keys", json={"key_alias": "ci", "expires": 4_000_000_000}), 422)
    for wrong in ({"group_by": "hour"}, {"since": "yesterday"}, {"cursor": "-1"}, {"key_id": "a\0"}, {"model": "\0"}):
        problem(used.http.get("/usage", params=wrong), 422)


def test_a_tenant_sees_its_own_whatever_it_asks(used: Api) -> None:
    other = Given(Principal(tenant="other", scopes=frozenset({"infer"}), key_id="k9"))
    transport = InProcess(mounted(create_app(used.services, other)))
    with httpx.Client(transport=transport, base_url=used.http.base_url) as used.http:
        for asked in ({}, {"tenant": "acme"}, {"tenant": "other"}):
            assert rows(used, group_by="tenant", **asked) == [("other", None, 1, 10)]
        assert rows(used, key_id="k1") == [(None, None, 0, 0)]


def test_the_command(used: Api, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("LORAY_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("LORAY_CATALOG", used.settings.catalog)
    shown = CliRunner().invoke(cli, ["usage", "--by", "tenant", "--by", "key"])
    assert shown.exit_code == 0, shown.output
    assert [line.split()[:3] for line in shown.output.splitlines() if "acme" in line] == [
        ["acme", "k1", "1"],
        ["acme", "k2", "1"],
    ]
    found = json.loads(CliRunner().invoke(cli, ["usage", "--tenant", "other", "--json"]).output)
    assert [(row["model"], row["num_output_tokens"]) for row in found] == [("tone", 3)]
    assert "no requests" in CliRunner().invoke(cli, ["usage", "--tenant", "nobody"]).output
