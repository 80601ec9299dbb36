"""HAProxy's environment on this machine, the script that closes what Ray's template opens, and what one serves that is
started anew.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from loray.local import cluster
from loray.local.cluster import serve_environment
from loray.local.processes import free_ports
from loray.schemas.openai import ErrorBody


def test_everything_of_it_is_in_a_folder_for_this_user_alone(tmp_path: Path) -> None:
    folder = tmp_path / "http"
    environment = serve_environment(tmp_path, folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert environment["RAY_SERVE_ENABLE_HA_PROXY"] == environment["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    files = ("CONFIG_FILE_LOC", "SOCKET_PATH", "METRICS_SOCKET_PATH", "SERVER_STATE_FILE")
    for name in (*files, "BINARY_PATH", "SERVER_STATE_BASE"):
        assert Path(environment[f"RAY_SERVE_HAPROXY_{name}"]).is_relative_to(folder)


def test_ray_reads_these_variables(tmp_path: Path) -> None:
    from ray.serve._private import constants

    source = Path(constants.__file__).read_text()
    for name in serve_environment(tmp_path, tmp_path / "http"):
        assert f'"{name}"' in source, name


def test_homes_have_ports_of_their_own(tmp_path: Path) -> None:
    def ports(home: str, folder: str) -> range:
        environment = serve_environment(Path("/homes") / home, tmp_path / folder)
        names = (
            f"RAY_SERVE_{name}_HTTP_PORT" for name in ("FALLBACK_PROXY", "DIRECT_INGRESS_MIN", "DIRECT_INGRESS_MAX")
        )
        fallback, first, last = (int(environment[name]) for name in names)
        assert fallback == first - 1
        return range(fallback, last + 1)

    one, two = ports("one", "a"), ports("two", "b")
    assert not set(one) & set(two)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", one[5]))
        taken.listen()
        assert not set(one) & set(ports("one", "c"))


@pytest.mark.parametrize("without", ["asked", "missing"])
def test_without_haproxy_rays_own_proxy_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: str) -> None:
    if without == "asked":
        monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "0")
    else:
        monkeypatch.setattr(cluster, "_haproxy", lambda: None)
    environment = serve_environment(tmp_path, tmp_path / "http")
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in environment
    assert environment["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    assert not (tmp_path / "http").exists()


@pytest.mark.parametrize("is_told", [True, False], ids=["ports of the environment", "Ray's ports"])
def test_only_this_user_reaches_statistics_and_metrics_and_nobody_holds_a_connection_for_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    """On Ray's own template. The script then becomes HAProxy, with the same arguments."""
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    monkeypatch.setattr(cluster, "_haproxy", lambda: "/bin/echo")
    folder = tmp_path / "http"
    environment = serve_environment(tmp_path, folder)
    values = {"frontend_host": "127.0.0.1", "frontend_port": "8000"}
    values |= {"stats_port": environment["RAY_SERVE_HAPROXY_STATS_PORT"]}
    values |= {"metrics_port": environment["RAY_SERVE_HAPROXY_METRICS_PORT"]}
    values |= {"timeout_client_s": "3600", "timeout_http_keep_alive_s": "90"}
    template = re.sub(r"\{% if [^%]*%\}(timeout .*)\{% endif %\}", r"\1", HAPROXY_CONFIG_TEMPLATE)
    template = re.sub(r"\{\{ *config\.(\w+) *\}\}", lambda m: values.get(m[1], m[0]), template)
    file = folder / "node" / "haproxy.cfg"
    file.parent.mkdir()
    file.write_text(template)
    command = [environment["RAY_SERVE_HAPROXY_BINARY_PATH"], "-db", "-f", str(file), "-dR"]
    if not is_told:
        del environment["RAY_SERVE_HAPROXY_STATS_PORT"], environment["RAY_SERVE_HAPROXY_METRICS_PORT"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["-dS", *command[1:]]
    bound = [line.split()[1:] for line in file.read_text().splitlines() if line.split()[:1] == ["bind"]]
    assert sorted(b for b in bound if "grpc" not in b[0] and b[0] != "{{") == [
        ["127.0.0.1:8000"],
        [f"unix@{file.parent}/prom.sock", "mode", "600"],
        [f"unix@{file.parent}/stats.sock", "mode", "600"],
    ]
    lines = [line.split() for line in file.read_text().splitlines()]
    given = lines[lines.index(["defaults"]) : lines.index(["frontend", "prometheus"])]
    waits = sorted(line[1:] for line in given if line[0] == "timeout" and line[1] not in ("connect", "queue", "server"))
    assert waits == [["client", "120s"], ["http-keep-alive", "75s"], ["http-request", "10s"]]
    head, _, body = (file.parent / "500.http").read_bytes().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert f"Content-Length: {len(body)}".encode() in head
    error = ErrorBody.model_validate_json(body).error
    assert (error.type, error.code) == ("server_error", "engine_unavailable")


class _Gateway(BaseHTTPRequestHandler):
    """Answers everything, health checks as well."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def gateway_port() -> Iterator[int]:
    with ThreadingHTTPServer(("127.0.0.1", 0), _Gateway) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


def test_one_that_is_started_anew_has_the_last_routes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gateway_port: int
) -> None:
    """As Ray Serve starts it and reloads it, with the routes always a reload later. 404 only where there are others."""
    from ray.serve._private import haproxy as of_ray
    from ray.serve.config import HTTPOptions

    environment = serve_environment(tmp_path, tmp_path / "http")
    monkeypatch.setattr(of_ray, "RAY_SERVE_HAPROXY_BINARY_PATH", environment["RAY_SERVE_HAPROXY_BINARY_PATH"])
    (port,) = free_ports(1)
    folder = tmp_path / "http" / "node"
    routes = {"app": of_ray.BackendConfig("app", "/app", servers=[of_ray.ServerConfig("g", "127.0.0.1", gateway_port)])}

    def started() -> Any:
        config = of_ray.HAProxyConfig(
            http_options=HTTPOptions(host="127.0.0.1", port=port),
            socket_path=str(folder / "admin.sock"),
            server_state_base=str(folder),
            server_state_file=str(folder / "state"),
            nbthread=1,
        )
        return of_ray.HAProxyApi(config, config_file_path=str(folder / "haproxy.cfg"))

    def ask(path: str) -> httpx.Response:
        return httpx.get(f"http://127.0.0.1:{port}{path}")

    async def lives() -> None:
        first, second = started(), None
        try:
            await first.start()
            response = await asyncio.to_thread(ask, "/app/v1/models")
            assert (response.status_code, response.headers["Retry-After"]) == (503, "1")
            assert ErrorBody.model_validate_json(response.text).error.code == "engine_unavailable"
            first.set_backend_configs(routes)
            await first.reload()
            found = [await asyncio.to_thread(ask, path) for path in ("/app/v1/models", "/elsewhere")]
            assert [response.status_code for response in found] == [200, 404]
            os.kill(first._proc.pid, signal.SIGKILL)
            await first._proc.wait()
            second = started()
            await second.start()
            assert (await asyncio.to_thread(ask, "/app/v1/models")).status_code == 200
            await second.reload()  # the application has ended
            assert (await asyncio.to_thread(ask, "/app/v1/models")).status_code == 503
        finally:
            for api in filter(None, (first, second)):
                await api.stop()

    asyncio.run(lives())
