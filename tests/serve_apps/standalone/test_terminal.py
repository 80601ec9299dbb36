"""`loray chat, top, logs, open, doctor` beside a server of this home."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from loray.cli import doctor
from loray.cli.main import cli
from tests.fixtures.cluster import Served


@pytest.fixture
def run(served_alone: Served, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command line in the home of a server, which is found there."""
    monkeypatch.setenv("LORAY_HOME", str(served_alone.settings.home))
    monkeypatch.delenv("LORAY_URL", raising=False)
    return lambda *args, input=None: CliRunner().invoke(cli, [str(a) for a in args], input=input)


def test_chat_with_a_server(run: Any, served_alone: Served) -> None:
    base = served_alone.base.name
    done = run("chat", base, "--compare", base, "--max-tokens", 3, input="hello\nagain\n")
    assert done.exit_code == 0, done.output
    assert done.output.count("3 tokens, ") == 2
    assert "first after" in done.output


def test_top_logs_and_pages_of_a_server(run: Any, served_alone: Served) -> None:
    found = json.loads(run("top", "--json", "--interval", 0.05).stdout)
    (replica,) = found["replicas"]
    assert found["base"] == served_alone.base.name
    assert 0 <= replica["pool_used"] <= 1
    assert found["gateways"]
    assert run("logs").exit_code == 0
    for page in ("metrics", "docs"):
        url = run("open", page, "--print").output.strip()
        assert url.startswith(served_alone.url)
        assert httpx.get(url).status_code == 200


def test_a_doctor_knows_its_own_server(run: Any, served_alone: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "kernels_problem", lambda: None)
    done = run("doctor", "--base", served_alone.base.name, "--port", served_alone.spec.port, "--json")
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert done.exit_code == 0, done.output
    assert checks["port"]["message"] == f"loray serves at port {served_alone.spec.port}"
    assert checks["memory"]["message"] == "what is served has its memory"
