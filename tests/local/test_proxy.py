"""HAProxy's environment on this machine, and the script that closes what Ray's template opens."""

from __future__ import annotations

import re
import socket
import subprocess
from pathlib import Path

import pytest

from loray.api.openai import ErrorBody
from loray.local import proxy
from loray.local.proxy import serve_environment


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
        monkeypatch.setattr(proxy, "_haproxy", lambda: None)
    environment = serve_environment(tmp_path, tmp_path / "http")
    assert "RAY_SERVE_ENABLE_HA_PROXY" not in environment
    assert environment["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    assert not (tmp_path / "http").exists()


@pytest.mark.parametrize("is_told", [True, False], ids=["ports of the environment", "Ray's ports"])
def test_statistics_and_metrics_listen_where_only_this_user_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_told: bool
) -> None:
    """On Ray's own template. The script then becomes HAProxy, with the same arguments."""
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    monkeypatch.setattr(proxy, "_haproxy", lambda: "/bin/echo")
    folder = tmp_path / "http"
    environment = serve_environment(tmp_path, folder)
    values = {"frontend_host": "127.0.0.1", "frontend_port": "8000"}
    values |= {"stats_port": environment["RAY_SERVE_HAPROXY_STATS_PORT"]}
    values |= {"metrics_port": environment["RAY_SERVE_HAPROXY_METRICS_PORT"]}
    template = re.sub(r"\{\{ *config\.(\w+) *\}\}", lambda m: values.get(m[1], m[0]), HAPROXY_CONFIG_TEMPLATE)
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
    head, _, body = (file.parent / "500.http").read_bytes().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert f"Content-Length: {len(body)}".encode() in head
    error = ErrorBody.model_validate_json(body).error
    assert (error.type, error.code) == ("server_error", "engine_unavailable")
