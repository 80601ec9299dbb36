"""Checks of the port and of the server of LORAY_URL; and the command with all of them."""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import grpc
import pytest

from loray.cli import doctor
from loray.cli.doctor import CHECKS, CheckResult, Situation, examined
from loray.errors import CatalogError
from loray.local.processes import free_ports
from loray.local.serving import announced
from tests.cli.doctor.conftest import Situations
from tests.cli.run import Loray
from tests.fixtures.authority import Authority


def test_a_port_that_somebody_else_has(situation: Situations) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        here = situation(spec={"port": port})
        taken = doctor.port(here)
        assert taken.severity == "error"
        assert f"port {port} is taken by process {os.getpid()}" in taken.message
        assert taken.mend == f"loray up --port {port + 1}"
        with announced(here.settings.home, f"http://127.0.0.1:{port}"):
            assert doctor.port(here).message == f"loray serves at port {port}"
    assert doctor.port(situation(spec={"port": free_ports(1)[0]})).severity == "ok"


@contextmanager
def answering(answer: Callable[[str, str | None], tuple[int, bytes]]) -> Iterator[str]:
    """A server at this URL. `answer`: a path and the header Authorization → status and body."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answer(self.path, self.headers.get("Authorization"))
            self.send_response_only(status)
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


@contextmanager
def dashboard(*nodes: tuple[str, int, str]) -> Iterator[str]:
    """Ray's, for the token `ray`. `nodes`: address, port and state."""
    summary = [{"raylet": {"nodeManagerAddress": a, "nodeManagerPort": p, "state": s}} for a, p, s in nodes]
    body = json.dumps({"result": True, "msg": "", "data": {"summary": summary}}).encode()

    def answer(path: str, authorization: str | None) -> tuple[int, bytes]:
        return (200 if authorization == "Bearer ray" and path == "/nodes?view=summary" else 401), body

    with answering(answer) as url:
        yield url


@contextmanager
def raylet(host: str, env: dict[str, str] | None = None) -> Iterator[tuple[str, int, str]]:
    """A gRPC server as Ray's, with the files of `env`."""
    server = grpc.server(ThreadPoolExecutor(1))
    if env is None:
        port = server.add_insecure_port(f"{host}:0")
    else:
        certificate, key, authority = (
            Path(env[f"RAY_TLS_{name}"]).read_bytes() for name in ("SERVER_CERT", "SERVER_KEY", "CA_CERT")
        )
        credentials = grpc.ssl_server_credentials([(key, certificate)], authority, require_client_auth=True)
        port = server.add_secure_port(f"{host}:0", credentials)
    server.start()
    yield host, port, "ALIVE"
    server.stop(None).wait()


def test_several_nodes_without_tls(situation: Situations, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "ray")
    first, second = "127.0.0.1", "127.0.0.2"
    env, port = Authority(tmp_path).node(first, second), free_ports(1)[0]
    lost = ("127.0.0.3", port, "DEAD")

    def found(*nodes: tuple[str, int, str]) -> CheckResult:
        with dashboard(*nodes) as url:
            return doctor.encryption(situation(env={"LORAY_ADDRESS": url}))

    with raylet(first) as plain, raylet(first, env) as secure, raylet(second, env) as secure_too:
        away = (second, port, "ALIVE")
        for nodes, severity, message in (
            ([plain, secure_too, lost], "warning", "2 nodes, and what goes between them is not encrypted"),
            ([plain, away, lost], "warning", "2 nodes, and what goes between them is not encrypted"),
            ([secure, secure_too, lost], "ok", "2 nodes, with TLS between them"),
            ([secure, away], "ok", "cannot be seen from this machine"),
            ([plain, lost], "ok", "on one machine"),
        ):
            told = found(*nodes)
            assert (told.severity, message in told.message) == (severity, True), told
            assert ("RAY_USE_TLS" in (told.mend or "")) == (severity == "warning")
        assert "no network" in doctor.encryption(situation()).message
        monkeypatch.delenv("RAY_AUTH_TOKEN")
        assert "could not be asked" in found(plain, secure_too).message


@pytest.fixture
def keyed() -> Iterator[str]:
    """A server that wants the key `right`."""

    def answer(path: str, authorization: str | None) -> tuple[int, bytes]:
        passes = authorization == "Bearer right"
        model = {"id": "tiny", "object": "model", "created": 0, "owned_by": "loray", "root": "tiny"} | {
            "max_model_len": 64
        }
        models = {"object": "list", "data": [model]}
        refusal = {"error": {"message": "the API key has expired", "type": "invalid_request_error"}}
        return (200 if passes else 401), json.dumps(models if passes else refusal).encode()

    with answering(answer) as url:
        yield url


def test_a_server_that_is_away_or_refuses(situation: Situations, keyed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.server(situation()).severity == "ok"
    away = doctor.server(situation(env={"LORAY_URL": f"http://127.0.0.1:{free_ports(1)[0]}"}))
    assert away.severity == "error"
    assert "no answer" in away.message
    assert "LORAY_URL" in (away.mend or "")
    for key, severity, message in (
        ("", "error", "the API key is missing: the API key has expired"),
        ("wrong", "error", "the API key is refused: the API key has expired"),
        ("right", "ok", "1 models"),
    ):
        monkeypatch.setenv("LORAY_API_KEY", key)
        finding = doctor.server(situation(env={"LORAY_URL": keyed, "LORAY_API_KEY": key}))
        assert finding.severity == severity
        assert message in finding.message
        assert ("loray keys create" in (finding.mend or "")) == (severity == "error")


def test_a_check_that_fails_is_an_error_and_the_others_go_on(situation: Situations) -> None:
    def one(s: Situation) -> CheckResult:
        raise CatalogError("it is away")

    def two(s: Situation) -> CheckResult:
        return CheckResult("ok", "well")

    found = dict(examined((one, two), situation()))
    assert (found["one"].severity, found["one"].message) == ("error", "it is away")
    assert found["two"].severity == "ok"


@pytest.mark.usefixtures("known_rates")
def test_the_command(loray: Loray, monkeypatch: pytest.MonkeyPatch, checkpoint: object) -> None:
    monkeypatch.setattr(doctor, "kernels_problem", lambda: None)
    port = free_ports(1)[0]
    ailing = loray("doctor", "--base", "tiny", "--port", port)
    assert ailing.code == 1
    assert "→ loray base add tiny" in ailing.out
    told = json.loads(loray("doctor", "--base", "tiny", "--port", port, "--json").out)
    assert told["ok"] is False
    assert [check["name"] for check in told["checks"]] == [check.__name__ for check in CHECKS]
    assert {c["severity"] for c in told["checks"] if c["name"] != "base"} <= {"ok", "warning"}
    loray("base", "add", checkpoint)
    assert loray("doctor", "--base", "tiny", "--port", port).code == 0
    monkeypatch.setenv("LORAY_URL", f"http://127.0.0.1:{port}")
    away = json.loads(loray("doctor", "--json").out)
    assert [check["name"] for check in away["checks"]] == ["python", "packages", "server"]
    assert len(json.loads(loray("doctor", "--here", "--json").out)["checks"]) == len(CHECKS)
