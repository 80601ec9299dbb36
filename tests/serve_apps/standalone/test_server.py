"""The end of a `loray serve`, by a signal, by two, and because the engine has stopped; and commands beside one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner
from starlette.applications import Starlette

from loray.cli import doctor
from loray.cli.main import cli
from loray.errors import EngineError
from loray.local.processes import bind, start_time
from serve_apps.standalone.server import UvicornServer
from tests.fixtures.asking import eventually
from tests.fixtures.cluster import Served
from tests.fixtures.standalone import Standalone, standalone

BODY: dict[str, Any] = {"model": "tiny", "max_tokens": 400, "ignore_eos": True, "stream": True}


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standalone]:
    with standalone(tmp_path_factory.mktemp("standalone"), max_queued=512) as server:
        yield server


def refused(server: Standalone) -> bool:
    try:
        httpx.get(f"{server.served.url}/health", timeout=30)
    except httpx.TransportError:  # a connection that was made before the port closed is reset
        return True
    return False


def test_a_request_under_way_ends_and_ray_was_never_imported(server: Standalone) -> None:
    url = server.served.url
    assert httpx.get(f"{url}/api/v1/adapters", timeout=30).json()["items"] == []
    assert httpx.get(f"{url}/metrics", timeout=30).status_code == 200
    with httpx.stream("POST", f"{url}/v1/completions", json=BODY | {"prompt": "a"}, timeout=60) as response:
        parts = response.iter_text()
        text = next(parts)
        server.process.terminate()
        assert eventually(lambda: refused(server))
        text += "".join(parts)
    events = text.split("\n")  # lines of httpx also end at characters that a text may have, as U+2028
    assert events[-3:] == ["data: [DONE]", "", ""]
    chunks = [json.loads(line.removeprefix("data: ")) for line in events if line.startswith("data: {")]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert server.process.wait(60) == 0
    assert "serving tiny at" in server.log
    assert "; waiting up to 120 s, again Ctrl-C ends them" in server.log
    assert "modules of Ray: []" in server.log


def test_a_second_signal_ends_requests_too(server: Standalone) -> None:
    body = BODY | {"prompt": ["a"] * 64, "n": 2}  # takes much longer than the test waits
    with httpx.stream("POST", f"{server.served.url}/v1/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        server.process.terminate()
        assert eventually(lambda: refused(server))
        server.process.terminate()
        with pytest.raises(httpx.HTTPError):
            list(lines)
    assert server.process.wait(30) == 0
    assert "Traceback" not in server.log


@pytest.mark.slow
def test_ranks_are_processes_that_end_with_it(tmp_path: Path) -> None:
    """Ctrl-C reaches the processes of the terminal's group; the other rank is needed until the answer ends."""
    with standalone(tmp_path, tensor_parallel_size=2) as server:
        children = Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
        commands = {pid: Path(f"/proc/{pid}/cmdline").read_text() for pid in map(int, children.read_text().split())}
        (rank,) = [pid for pid, command in commands.items() if "parallel.worker" in command]
        url = f"{server.served.url}/v1/completions"
        with httpx.stream("POST", url, json=BODY | {"prompt": "a"}, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            os.killpg(server.process.pid, signal.SIGINT)
            assert list(lines)[-2:] == ["data: [DONE]", ""]
        assert server.process.wait(60) == 0
        assert eventually(lambda: start_time(rank) is None)


def test_it_ends_when_the_engine_has_stopped() -> None:
    def check_health() -> None:
        raise EngineError("the engine stopped: out of memory")

    ready: list[str] = []
    app: Any = Starlette()
    server = UvicornServer(
        app, check_health=check_health, started=lambda: ready.append("ready"), stopping=lambda _: None
    )
    with bind("127.0.0.1", 0) as listener:
        asyncio.run(server.serve([listener]))
    assert ready == ["ready"]
    assert str(server.failure) == "the engine stopped: out of memory"


@pytest.fixture
def run(served_alone: Served, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The command line in the home of a server, which is found there."""
    monkeypatch.setenv("LORAY_HOME", str(served_alone.settings.home))
    monkeypatch.delenv("LORAY_URL", raising=False)
    return lambda *args, input=None: CliRunner().invoke(cli, [str(a) for a in args], input=input)


def test_chat_with_a_server(run: Any, served_alone: Served) -> None:
    base = served_alone.base.name
    words = ["--max-tokens", 3, "--temperature", 0]  # drawn tokens may have no text, and then no time of the first
    done = run("chat", base, "--compare", base, *words, input="hello\nagain\n")
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
