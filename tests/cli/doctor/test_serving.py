"""Checks of the port and of the server of LORAY_URL; and the command with all of them."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from loray.cli.doctor import kernels, serving
from loray.cli.doctor.command import CHECKS, examined
from loray.cli.doctor.finding import Check, Finding, Situation
from loray.errors import CatalogError
from loray.local.processes import free_ports
from loray.local.standalone import announced
from tests.cli.doctor.conftest import Situations
from tests.cli.run import Loray


def test_a_port_that_somebody_else_has(situation: Situations) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        here = situation(spec={"port": port})
        taken = serving.port(here)
        assert taken.severity == "error"
        assert f"port {port} is taken by process {os.getpid()}" in taken.message
        assert taken.mend == f"loray up --port {port + 1}"
        with announced(here.settings.home, f"http://127.0.0.1:{port}"):
            assert serving.port(here).message == f"loray serves at port {port}"
    assert serving.port(situation(spec={"port": free_ports(1)[0]})).severity == "ok"


@pytest.fixture
def keyed() -> Iterator[str]:
    """A server that wants the key `right`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            passes = self.headers.get("Authorization") == "Bearer right"
            model = {"id": "tiny", "object": "model", "created": 0, "owned_by": "loray", "root": "tiny"} | {
                "max_model_len": 64
            }
            models = {"object": "list", "data": [model]}
            refusal = {"error": {"message": "the API key has expired", "type": "invalid_request_error"}}
            body = json.dumps(models if passes else refusal).encode()
            self.send_response_only(200 if passes else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_server_that_is_away_or_refuses(situation: Situations, keyed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert serving.server(situation()).severity == "ok"
    away = serving.server(situation(env={"LORAY_URL": f"http://127.0.0.1:{free_ports(1)[0]}"}))
    assert away.severity == "error"
    assert "no answer" in away.message
    assert "LORAY_URL" in (away.mend or "")
    for key, severity, message in (
        ("", "error", "the API key is missing: the API key has expired"),
        ("wrong", "error", "the API key is refused: the API key has expired"),
        ("right", "ok", "1 models"),
    ):
        monkeypatch.setenv("LORAY_API_KEY", key)
        finding = serving.server(situation(env={"LORAY_URL": keyed, "LORAY_API_KEY": key}))
        assert finding.severity == severity
        assert message in finding.message
        assert ("loray keys create" in (finding.mend or "")) == (severity == "error")


def test_a_check_that_fails_is_an_error_and_the_others_go_on(situation: Situations) -> None:
    def fails(s: Situation) -> Finding:
        raise CatalogError("it is away")

    checks = (Check("one", fails), Check("two", lambda s: Finding("ok", "well")))
    found = dict(examined(checks, situation()))
    assert (found["one"].severity, found["one"].message) == ("error", "it is away")
    assert found["two"].severity == "ok"


@pytest.mark.usefixtures("known_rates")
def test_the_command(loray: Loray, monkeypatch: pytest.MonkeyPatch, checkpoint: object) -> None:
    monkeypatch.setattr(kernels, "problem", lambda: None)
    port = free_ports(1)[0]
    ailing = loray("doctor", "--base", "tiny", "--port", port)
    assert ailing.code == 1
    assert "→ loray base add tiny" in ailing.out
    told = json.loads(loray("doctor", "--base", "tiny", "--port", port, "--json").out)
    assert told["ok"] is False
    assert [check["name"] for check in told["checks"]] == [check.name for check in CHECKS]
    assert {c["severity"] for c in told["checks"] if c["name"] != "base"} <= {"ok", "warning"}
    loray("base", "add", checkpoint)
    assert loray("doctor", "--base", "tiny", "--port", port).code == 0
    monkeypatch.setenv("LORAY_URL", f"http://127.0.0.1:{port}")
    away = json.loads(loray("doctor", "--json").out)
    assert [check["name"] for check in away["checks"]] == ["python", "packages", "server"]
    assert len(json.loads(loray("doctor", "--here", "--json").out)["checks"]) == len(CHECKS)
