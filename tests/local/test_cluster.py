"""The local Ray cluster: started once, found again, token-protected, and stopped with everything it started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from loray.errors import ClusterError
from loray.local.cluster import current_cluster, start_local_cluster, stop_local_cluster
from loray.local.processes import pid_scope, start_time
from tests.fixtures.cluster import NUM_CPUS, RayCluster


def test_none_is_running(tmp_path: Path) -> None:
    assert current_cluster(tmp_path / "nowhere") is None
    assert stop_local_cluster(tmp_path / "nowhere") is False
    (tmp_path / "cluster.json").write_text("{")
    assert current_cluster(tmp_path) is None
    assert stop_local_cluster(tmp_path) is False
    assert not (tmp_path / "cluster.json").exists()


def test_a_reused_pid_is_not_the_cluster(tmp_path: Path) -> None:
    write_state(tmp_path, os.getpid(), 1, pid_scope())
    assert current_cluster(tmp_path) is None
    assert stop_local_cluster(tmp_path) is False


def write_state(home: Path, pid: int, started: int, scope: str) -> None:
    state = {"address": "http://127.0.0.1:1", "gcs_address": "127.0.0.1:2", "pid": pid, "started": started}
    state |= {"scope": scope, "temp_dir": "/tmp/loray-no-such-folder"}
    state |= {"token_file": str(home / "k"), "log_file": str(home / "l")}
    (home / "cluster.json").write_text(json.dumps(state))


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
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"{cluster.address}/api/jobs/", timeout=10)
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
