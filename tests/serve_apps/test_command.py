"""The commands `loray up`, `status` and `down`, without a cluster and with the session's."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from loray.errors import BaseNotFound, ClusterError, ConflictError, SettingsError, SpecError
from loray.local.serving import ServingAddress
from loray.schemas.status import (
    AutoscalingStatus,
    BaseStatus,
    CatalogStatus,
    EngineStatus,
    ReplicaStatus,
    ScalingDecision,
    Status,
)
from loray.settings import Settings
from loray.spec import FleetSpec, ServeSpec
from serve_apps import command
from serve_apps.command import _settle_port, replica_row, show_status
from serve_apps.deployment import ApplicationState, serve_config
from serve_apps.options import read_spec
from tests.conftest import REPOSITORY
from tests.fixtures.cluster import RayCluster, Served, free_port
from tests.fixtures.tiny import write_checkpoint
from tests.serve_apps.conftest import Loray


@pytest.fixture
def listening() -> Iterator[int]:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        yield s.getsockname()[1]


def test_help_imports_no_ray() -> None:
    modules = "serve_apps.command, serve_apps.deployment, serve_apps.replica.replica"
    code = f"import sys, {modules}; sys.exit('ray' in sys.modules or 'torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=REPOSITORY).returncode == 0


def test_options_go_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("base: mine\nport: 9000\npool_bytes: 1MiB\n")
    (spec,) = read_spec(file, {"port": 9001, "pool_bytes": "2MiB"}).bases
    assert (spec.base, spec.port, spec.pool_bytes) == ("mine", 9001, 2 << 20)
    file.write_text("pool: 1\n")
    with pytest.raises(SpecError, match=r"pool: .*known fields: .*pool_bytes"):
        read_spec(file, {})


def test_options_of_one_base_are_refused_beside_several(tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("port: 9000\nbases: [{base: a}, {base: b, max_num_seqs: 3}]\n")
    fleet = read_spec(file, {"port": 9001, "num_gateways": 2, "base": None})
    assert (fleet.names, fleet.port, fleet.num_gateways) == (("a", "b"), 9001, 2)
    assert [spec.max_num_seqs for spec in fleet.bases] == [32, 3]
    with pytest.raises(SpecError, match="leave out --max-replicas, --pool-bytes"):
        read_spec(file, {"pool_bytes": "1MiB", "max_replicas": 2})
    file.write_text("bases: [{base: a}, {base: a}]\n")
    with pytest.raises(SpecError, match="the same base twice: a"):
        read_spec(file, {})


def test_gateways_are_an_option(loray: Loray) -> None:
    refused = loray("up", "--num-gateways", 0).exception
    assert isinstance(refused, SpecError)
    assert "num_gateways" in str(refused)


def test_bounds_make_the_number_of_replicas_follow_demand(tmp_path: Path) -> None:
    assert read_spec(None, {"num_replicas": 2}).bases[0].autoscaling is None
    (spec,) = read_spec(None, {"max_replicas": 3}).bases
    assert (spec.min_replicas, spec.max_replicas, spec.num_replicas) == (1, 3, 1)
    file = tmp_path / "spec.yaml"
    file.write_text("autoscaling: {min_replicas: 2, max_replicas: 6, window_s: 30}\n")
    scaling = read_spec(file, {"max_replicas": 3}).bases[0].autoscaling
    assert scaling is not None
    assert (scaling.min_replicas, scaling.max_replicas, scaling.window_s) == (2, 3, 30)
    with pytest.raises(SpecError, match="max_replicas must be at least min_replicas"):
        read_spec(None, {"min_replicas": 3, "max_replicas": 2})


def test_nothing_runs(loray: Loray, tmp_path: Path) -> None:
    assert "nothing is being served" in loray("status").output
    store = f"file://{tmp_path}/home/store"
    assert json.loads(loray("status", "--json").output) == {"serving": False, "store": store}
    assert f"store: {store}" in loray("status").output
    assert "nothing is running" in loray("down").output


def test_missing_base_and_wrong_options(loray: Loray) -> None:
    missing = loray("up", "--base", "nobody").exception
    assert isinstance(missing, BaseNotFound)
    assert "loray base add nobody" in str(missing)
    wrong = loray("up", "--pool-bytes", "5 parsecs").exception
    assert isinstance(wrong, SpecError)
    assert "pool_bytes" in str(wrong)


def test_a_taken_port_is_refused_before_ray_starts(loray: Loray, listening: int, tmp_path: Path) -> None:
    from loray.bases.registry import add_base

    add_base(str(write_checkpoint(tmp_path / "checkpoint")), home=tmp_path / "home", name="tiny")
    taken = loray("up", "--base", "tiny", "--port", listening).exception
    assert isinstance(taken, ConflictError)
    assert f"--port {listening + 1}" in str(taken)
    assert not (tmp_path / "home" / "cluster.json").exists()


def test_a_remote_cluster_cannot_reach_local_files(loray: Loray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAY_ADDRESS", "http://ray.example:8265")
    refused = loray("up").exception
    assert isinstance(refused, SettingsError)
    assert "LORAY_STORE" in str(refused)


def test_an_update_keeps_its_port() -> None:
    serving, moved = ServingAddress("127.0.0.1", 8001), FleetSpec.of(ServeSpec(port=free_port()))
    assert _settle_port(FleetSpec.of(ServeSpec(base="tiny")), serving).port == 8001
    assert _settle_port(moved, None) == moved
    with pytest.raises(ConflictError, match=r"runs at port 8001 and cannot move to \d+"):
        _settle_port(moved, serving)
    with pytest.raises(ConflictError, match=r"runs at host 127\.0\.0\.1 and cannot move to 0\.0\.0\.0"):
        _settle_port(FleetSpec.of(ServeSpec(port=8001, host="0.0.0.0")), serving)


def test_fields_of_the_file_count_as_set(tmp_path: Path) -> None:
    file = tmp_path / "spec.yaml"
    file.write_text("port: 9000\n")
    assert read_spec(file, {"base": "tiny"}).fields_set == {"port"}
    assert read_spec(None, {"base": "tiny"}).fields_set == set()


def test_a_request_whose_adapter_loads_is_counted_once() -> None:
    replica = ReplicaStatus(replica="r", node="n", pid=1, uptime_s=1.0, num_running=2, num_waiting=3, num_loading=1)
    assert replica_row(replica)[4:6] == (2, 3)


def test_status_shows_why_the_number_of_replicas_is_what_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    decision = ScalingDecision(time=0.0, from_replicas=1, to_replicas=2, reason="working set 12.0 MiB of 12 adapters")
    report = Status(
        status="ok",
        bases=(
            BaseStatus(
                base="tiny",
                status="ok",
                num_replicas=2,
                target=2,
                num_adapters=12,
                spec=ServeSpec(base="tiny"),
                autoscaling=AutoscalingStatus(
                    target=2, reason="tokens need 2 replicas", time=9.0, decisions=(decision,)
                ),
            ),
        ),
        catalog=CatalogStatus(num_adapters=12),
        replicas=(),
        totals=EngineStatus(),
    )
    show_status("http://u", ApplicationState("RUNNING", "", 0.0, {}), report, None, "http://d", "file:///s")
    shown = capsys.readouterr().out
    assert "2 wanted: tokens need 2 replicas" in shown
    (row,) = [line.split() for line in shown.splitlines() if "working set" in line]
    assert row[2:5] == ["1", "2", "working"]


class Stopping:
    """Stands in for ServeApi while Serve ends."""

    def __init__(self, *answers: ServingAddress | Exception | None) -> None:
        self.answers = list(answers)

    def http(self) -> ServingAddress | None:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_the_end_of_requests_under_way_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_POLL_S", 0.0)
    address = ServingAddress("127.0.0.1", 8000)
    api: Any = Stopping(address, ClusterError("it is ending"), address, None)
    command._wait_until_stopped(api)
    assert api.answers == [None]
    monkeypatch.setattr(command, "DRAIN_S", -command._SHUTDOWN_S)
    with pytest.raises(ClusterError, match="loray status"):
        command._wait_until_stopped(Stopping(address))  # type: ignore[arg-type]


def test_a_failures_reason_is_lorays_message() -> None:
    trace = "File x\nloray.errors.SpecError: pool_bytes=1 holds nothing\nmore\n"
    assert ApplicationState("DEPLOY_FAILED", trace, 0.0, {}).reason == "pool_bytes=1 holds nothing"
    assert ApplicationState("DEPLOY_FAILED", "a\nb", 0.0, {}).reason == "a\nb"
    state = ApplicationState("DEPLOYING", "", 0.0, {"engine-tiny": {"STARTING": 1}, "gateway": {}})
    assert str(state) == "deploying: engine-tiny 1 starting; gateway …"


def test_what_up_deploys_is_a_serve_config(tmp_path: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = serve_config(FleetSpec.of(ServeSpec(port=1234)), Settings.from_env({"LORAY_HOME": str(tmp_path)}))
    schema = ServeDeploySchema.model_validate(config)
    assert schema.http_options.port == 1234
    ServeSpec.parse(schema.applications[0].args, source="args")


@pytest.mark.cluster
def test_a_second_up_is_an_update_and_status_shows_it(
    ray_cluster: RayCluster, served: Served, monkeypatch: pytest.MonkeyPatch, loray: Loray, tmp_path: Path
) -> None:
    for name, value in ray_cluster.settings.to_env().items():
        monkeypatch.setenv(name, value)
    file = tmp_path / "spec.yaml"
    file.write_text(yaml.safe_dump(served.spec.model_dump(mode="json", exclude={"port"}, exclude_none=True)))
    up = loray("up", "--spec", file)
    assert up.exit_code == 0, up.output
    assert f"serving tiny at {served.url}/v1" in up.output
    assert "curl" in up.output
    moved = loray("up", "--spec", file, "--port", free_port()).exception
    assert isinstance(moved, ConflictError)
    status: Any = json.loads(loray("status", "--json").output)
    assert (status["serving"], status["url"], status["gateway"]["bases"][0]["base"]) == (
        True,
        served.url,
        "tiny",
    )
    table = loray("status").output
    assert "running" in table
    assert "hit rate" in table
    assert served.url in table
