"""Two gateways on a real Ray cluster: whose requests are whose, and what a lost or silent gateway leaves behind."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from loray.spec import GATEWAY
from serve_apps.deployment import ServeApi
from tests.fixtures.cluster import RayCluster, Served, deployed

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NAME = "plane"
BODY: dict[str, Any] = {"model": "tiny", "prompt": "a", "ignore_eos": True}
LONG = BODY | {"max_tokens": 500, "stream": True}


@pytest.fixture(scope="module")
def app(ray_cluster: RayCluster, served: Served) -> Iterator[Served]:
    with deployed(ray_cluster, served, NAME, num_gateways=2) as app:
        yield app


@pytest.fixture
def http(app: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=app.url, timeout=60) as client:
        yield client


def gateways(cluster: RayCluster) -> dict[str, int]:
    """Pids of the running gateways, by name."""
    applications = ServeApi(cluster.address)._details()["applications"]
    replicas = applications[NAME]["deployments"][GATEWAY]["replicas"]
    return {r["replica_id"]: r["pid"] for r in replicas if r["state"] == "RUNNING"}


def totals(http: httpx.Client) -> dict[str, Any]:
    found: dict[str, Any] = http.get("/status").raise_for_status().json()["totals"]
    return found


def eventually(what: Callable[[], bool], timeout_s: float = 90) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            if what():
                return
        except httpx.HTTPError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.1)


def answered(http: httpx.Client) -> dict[str, float]:
    """Completions by gateway."""
    families = text_string_to_metric_families(http.get("/metrics").raise_for_status().text)
    samples = [s for f in families if f.name == "loray_http_requests" for s in f.samples]
    wanted = {"route": "/v1/completions", "code": "200"}
    return {s.labels["gateway"]: s.value for s in samples if wanted.items() <= s.labels.items()}


def test_whichever_gateway_answers_all_requests_are_counted_once(ray_cluster: RayCluster, http: httpx.Client) -> None:
    before = answered(http)
    for _ in range(20):
        assert http.post("/v1/completions", json=BODY | {"max_tokens": 2}).status_code == 200
    after = [answered(http) for _ in range(4)]  # of both, in turn
    assert after == [after[0]] * 4
    assert after[0].keys() <= gateways(ray_cluster).keys()
    assert sum(after[0].values()) - sum(before.values()) == 20
    assert len(after[0]) == 2  # HAProxy sent requests to both


def test_lost_gateways_leave_no_work_behind(ray_cluster: RayCluster, http: httpx.Client) -> None:
    before = totals(http)
    lost = gateways(ray_cluster)
    with ExitStack() as streams:
        for _ in lost:
            response = streams.enter_context(http.stream("POST", "/v1/completions", json=LONG))
            next(response.iter_lines())
        for pid in lost.values():
            os.kill(pid, signal.SIGKILL)
    eventually(lambda: totals(http)["num_running"] == 0)
    after = totals(http)
    assert after["num_finished"] == before["num_finished"]  # the engine did not go on for nobody
    assert after["blocks"]["kv"] == 0
    eventually(lambda: len(gateways(ray_cluster)) == 2 and not gateways(ray_cluster).keys() & lost.keys())
    assert http.post("/v1/completions", json=BODY | {"max_tokens": 2}).status_code == 200


def test_a_gateway_that_stands_still_holds_up_nobody(ray_cluster: RayCluster, app: Served, http: httpx.Client) -> None:
    """The engine ends its requests meanwhile; their tokens are there when the gateway goes on."""
    before = totals(http)
    pid = next(iter(gateways(ray_cluster).values()))
    with ExitStack() as streams, httpx.Client(base_url=app.url, timeout=5) as impatient:
        lines = []
        for _ in range(2):  # HAProxy gives one to each
            response = streams.enter_context(http.stream("POST", "/v1/completions", json=LONG))
            lines.append(response.iter_lines())
            next(lines[-1])
        os.kill(pid, signal.SIGSTOP)
        try:
            eventually(lambda: totals(impatient)["num_finished"] == before["num_finished"] + 2)
        finally:
            os.kill(pid, signal.SIGCONT)
        for rest in lines:
            events = [line for line in rest if line]
            assert events[-1] == "data: [DONE]"
            assert '"finish_reason":"length"' in events[-2].replace(" ", "")


def test_the_proxy_and_the_gateways_listen_on_loopback_alone(
    ray_cluster: RayCluster, served: Served, app: Served
) -> None:
    folder = Path(f"{ray_cluster.local.temp_dir}-http")
    assert folder.stat().st_mode & 0o777 == 0o700
    (configuration,) = folder.rglob("haproxy.cfg")
    proxies = [
        int(p.parent.name)
        for p in Path("/proc").glob("[0-9]*/cmdline")
        if str(configuration).encode() in p.read_bytes()
    ]
    assert proxies
    assert {place for pid in proxies for place in listening(pid)} == {("127.0.0.1", served.spec.port)}
    for pid in gateways(ray_cluster).values():
        ours = [(host, port) for host, port in listening(pid) if 20_000 <= port < 32_000]  # the others are Ray's
        assert [host for host, _ in ours] == ["127.0.0.1"]
    for name in ("admin.sock", "stats.sock", "prom.sock"):
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(configuration.with_name(name)))


def listening(pid: int) -> list[tuple[str, int]]:
    """Where a process listens for TCP."""
    mine = {os.readlink(fd) for fd in Path(f"/proc/{pid}/fd").iterdir() if fd.is_symlink()}
    found = []
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *rest = line.split()
        if state == "0A" and f"socket:[{rest[5]}]" in mine:
            host, port = local.split(":")
            found.append((socket.inet_ntoa(bytes.fromhex(host)[::-1]), int(port, 16)))
    return found
