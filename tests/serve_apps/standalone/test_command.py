"""The command `loray serve`: what it refuses, and what `loray status` and `loray down` know of it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loray.errors import BaseNotFound, ClusterError, ConflictError, SpecError
from loray.local.serving import announced, standalone_servers
from loray.publishing import Destination, publish
from loray.settings import Settings
from loray.spec import FleetSpec, ServeSpec
from serve_apps.standalone.command import one_engine
from serve_apps.standalone.server import LocalJobServer
from tests.conftest import REPOSITORY
from tests.fixtures.standalone import standalone
from tests.fixtures.tiny import write_checkpoint
from tests.serve_apps.asking import answer_of
from tests.serve_apps.conftest import Loray


def test_the_command_is_light() -> None:
    code = (
        "import sys, serve_apps.standalone.command;"
        "print([m for m in 'torch ray transformers fastapi uvicorn'.split() if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert out.stdout.strip() == "[]"


def test_replicas_need_ray() -> None:
    assert (
        one_engine(FleetSpec.of(ServeSpec(tensor_parallel_size=2))).tensor_parallel_size == 2
    )  # its ranks are processes
    with pytest.raises(SpecError, match=r"runs one engine: leave out num_replicas, or use `loray up`"):
        one_engine(FleetSpec.of(ServeSpec(num_replicas=2)))
    with pytest.raises(SpecError, match="leave out autoscaling and num_replicas"):
        one_engine(FleetSpec.parse({"num_replicas": 2, "autoscaling": {}}, source="the test"))
    with pytest.raises(SpecError, match="runs one engine and so one base: of a, b give one"):
        one_engine(FleetSpec.of(ServeSpec(base="a"), ServeSpec(base="b")))


def test_wrong_options(loray: Loray) -> None:
    assert "loray base add nobody" in str(loray("serve", "nobody").exception)
    assert isinstance(loray("serve", "nobody").exception, BaseNotFound)
    assert "give one of them" in str(loray("serve", "one", "--base", "other").exception)
    assert "pool_bytes" in str(loray("serve", "--pool-bytes", "5 parsecs").exception)
    assert "'hermes', 'llama3_json', 'mistral'" in loray("serve", "--tool-parser", "other").output


def test_a_taken_port_is_refused_before_anything_is_loaded(loray: Loray, tmp_path: Path) -> None:
    from loray.bases.registry import add_base

    add_base(str(write_checkpoint(tmp_path / "checkpoint")), home=tmp_path / "home", name="tiny")
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = s.getsockname()[1]
        taken = loray("serve", "tiny", "--port", port).exception
    assert isinstance(taken, ConflictError)
    assert f"`loray serve --port {port + 1}`" in str(taken)


def test_a_server_is_known_while_it_runs(tmp_path: Path) -> None:
    assert standalone_servers(tmp_path) == []
    with announced(tmp_path, "http://127.0.0.1:1"):
        (known,) = standalone_servers(tmp_path)
        assert (known.url, known.is_alive) == ("http://127.0.0.1:1", True)
        (file,) = (tmp_path / "serve").iterdir()
        state = file.read_text()
    assert standalone_servers(tmp_path) == []
    file.write_text(state.replace(f'"started": {known.started}', '"started": 1'))  # another process has its pid
    assert standalone_servers(tmp_path) == []
    assert not file.exists()


def test_jobs_need_a_cluster(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="`loray train RECIPE` starts one"):
        LocalJobServer(Settings.from_env({"LORAY_HOME": str(tmp_path)})).find("a")
    remote = Settings.from_env({"LORAY_HOME": str(tmp_path), "LORAY_ADDRESS": "http://head.example:8265"})
    with pytest.raises(ClusterError, match="sends no jobs to another machine"):
        LocalJobServer(remote).find("a")


def test_a_home_with_an_s3_server(loray: Loray, peft_folder: Callable[..., Path], tmp_path: Path) -> None:
    """It serves from the bucket, `loray status` finds it, and `loray down` leaves the bucket's server to it."""
    with standalone(tmp_path, "--s3") as server:
        served = server.served
        assert served.settings.store.startswith("s3://")
        publish(peft_folder(served.base), served.base, Destination("kept", served.store, served.catalog))
        assert answer_of(served, "kept")
        for args in ([], ["--url", f"{served.url}/v1"]):
            shown: Any = json.loads(loray("status", "--json", *args).output)
            assert (shown["serving"], shown["url"], shown["gateway"]["bases"][0]["base"]) == (True, served.url, "tiny")
        assert "kept@1" in loray("status").output
        assert f"`loray serve` goes on at {served.url}" in loray("down").output
        publish(peft_folder(served.base, seed=1), served.base, Destination("later", served.store, served.catalog))
        assert answer_of(served, "later")
        assert server.end() == 0
    assert "nothing is being served" in loray("status").output
    assert loray("status", "--url", served.url).exit_code == 1
    assert "stopped the local S3 server" in loray("down").output
