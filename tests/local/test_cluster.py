"""The local Ray cluster: started once, found again, token-protected, stopped with all that it started; HAProxy."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from loray import SPIN_COUNT
from loray.errors import ClusterError
from loray.local import cluster
from loray.local.cluster import current_cluster, inherited, serve_environment, start_local_cluster, stop_local_cluster
from loray.local.processes import free_ports, pid_scope, start_time
from loray.schemas.openai import ErrorBody
from tests.fixtures.calls import refused
from tests.fixtures.cluster import NUM_CPUS, RayCluster


def test_none_is_running(tmp_path: Path) -> None:
    assert current_cluster(tmp_path / "nowhere") is None
    assert stop_local_cluster(tmp_path / "nowhere") is False
    (tmp_path / "cluster.json").write_text("{")
    assert current_cluster(tmp_path) is None
    assert stop_local_cluster(tmp_path) is False
    assert not (tmp_path / "cluster.json").exists()


def write_state(home: Path, pid: int, started: int, scope: str) -> None:
    places = {"temp_dir": "/tmp/loray-no-such-folder", "token_file": str(home / "k"), "log_file": str(home / "l")}
    state = {"address": "http://127.0.0.1:1", "gcs_address": "127.0.0.1:2", "pid": pid, "started": started}
    (home / "cluster.json").write_text(json.dumps(state | places | {"scope": scope}))


def test_a_reused_pid_is_not_the_cluster(tmp_path: Path) -> None:
    write_state(tmp_path, os.getpid(), 1, pid_scope())
    assert current_cluster(tmp_path) is None
    assert stop_local_cluster(tmp_path) is False


def test_a_pid_of_another_boot_or_container_is_another_process(tmp_path: Path) -> None:
    """In containers pids are small, so even the start time may be the same."""
    stranger = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        started = start_time(stranger.pid)
        assert started is not None
        boot, namespace = pid_scope().split()
        for scope in (f"another-boot {namespace}", f"{boot} pid:[1]"):
            write_state(tmp_path, stranger.pid, started, scope)
            assert current_cluster(tmp_path) is None
            assert stop_local_cluster(tmp_path) is False
        assert stranger.poll() is None
        write_state(tmp_path, stranger.pid, started, pid_scope())
        assert current_cluster(tmp_path) is not None
        assert stop_local_cluster(tmp_path) is True
        assert stranger.wait(10) == -signal.SIGTERM
    finally:
        stranger.kill()
        stranger.wait()


def test_failure_shows_the_log(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="Ray ended with code") as failure:
        start_local_cluster(tmp_path, env={"PYTHONHOME": str(tmp_path / "nowhere")})
    assert "cluster.log" in str(failure.value)
    assert "encodings" in str(failure.value)
    assert current_cluster(tmp_path) is None


@pytest.mark.cluster
def test_started_once_and_for_its_user_alone(ray_cluster: RayCluster) -> None:
    """The fixture checks at the end that it is stopped with everything that it started."""
    cluster = ray_cluster.local
    assert start_local_cluster(ray_cluster.home) == cluster == current_cluster(ray_cluster.home)
    refused(urllib.error.HTTPError, "401", urllib.request.urlopen, f"{cluster.address}/api/jobs/", timeout=10)
    code = (
        "import ray; ray.init(log_to_driver=False)\n"
        "assert ray.get(ray.remote(lambda: 6 * 7).remote()) == 42\n"
        "print(int(ray.cluster_resources()['CPU']))"
    )
    env = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    driver = subprocess.run(
        [sys.executable, "-c", code], env=env | cluster.client_env, capture_output=True, text=True, timeout=120
    )
    assert driver.stdout == f"{NUM_CPUS}\n", driver.stderr
    assert (ray_cluster.home / "ray-token").stat().st_mode & 0o777 == 0o600


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


@pytest.mark.parametrize(
    ("given", "found"), [({}, 10000), ({"GOMP_SPINCOUNT": "77"}, 77), ({"OMP_WAIT_POLICY": "passive"}, 0)]
)
def test_a_user_s_setting_counts(given: Mapping[str, str], found: int) -> None:
    own = {name: v for name, v in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    environment = own | {"OMP_DISPLAY_ENV": "VERBOSE"} | given
    run = [sys.executable, "-c", "from loray.engine import engine"]
    shown = subprocess.run(run, env=environment, check=True, capture_output=True, text=True).stderr
    if "GOMP_SPINCOUNT" not in shown:
        pytest.skip("torch has another OpenMP here")
    assert re.findall(r"GOMP_SPINCOUNT = '(\d+)'", shown) == [str(found)]


def test_engines_of_a_local_cluster_keep_their_processors() -> None:
    assert inherited({"GOMP_SPINCOUNT": SPIN_COUNT})["GOMP_SPINCOUNT"] == "300000"
    assert inherited({"GOMP_SPINCOUNT": "77"})["GOMP_SPINCOUNT"] == "77"
    assert "GOMP_SPINCOUNT" not in inherited({"OMP_WAIT_POLICY": "passive"})
