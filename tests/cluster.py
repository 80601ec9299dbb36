"""The session's Ray cluster, for tests marked `cluster`. The first test that uses it starts it."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from loray.bases.registry import BaseModel, add_base
from loray.catalog import Catalog
from loray.local.cluster import LocalCluster, current_cluster, start_local_cluster, stop_local_cluster
from loray.settings import Settings
from loray.spec import FleetSpec, ServeSpec
from loray.store import AdapterStore, open_store

NUM_CPUS = 4
# Short intervals, in seconds: tests kill processes and wait until Serve and Train notice it.
_QUICK = {
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.3",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # a process for each run, of machines that are taken away
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "PYTHONWARNINGS": "ignore",
    "OMP_NUM_THREADS": "1",  # there are more processes than cores
}


@dataclass(frozen=True)
class RayCluster:
    """`address` is the job server's URL; this process is connected as a driver."""

    home: Path
    settings: Settings
    local: LocalCluster

    @property
    def address(self) -> str:
        return self.local.address

    @property
    def env(self) -> dict[str, str]:
        """The environment of processes that use this cluster and this home."""
        return self.settings.to_env() | self.local.client_env


@dataclass(frozen=True)
class Served:
    """The Serve application on a tiny random base, in float32."""

    url: str
    base: BaseModel
    store: AdapterStore
    catalog: Catalog
    settings: Settings
    spec: ServeSpec


# Ray reads its token once, when it is imported, and test modules import it before the cluster starts.
_FOLDER = Path(tempfile.gettempdir()) / f"loray-cluster-{os.getpid()}"
os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(_FOLDER / "home" / "ray-token")}


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[RayCluster]:
    home = _FOLDER / "home"
    # To measure the peak takes longer than a tiny model's training. tests/infra/test_deploy.py leaves that to its job.
    peak = {"LORAY_PEAK_TFLOPS": "1"}
    settings = Settings.from_env({"LORAY_HOME": str(home), "LORAY_LOG_LEVEL": "WARNING"} | peak)
    local = start_local_cluster(home, num_cpus=NUM_CPUS, env=settings.to_env() | _QUICK)
    try:
        with pytest.MonkeyPatch.context() as environment:
            for name, value in local.client_env.items():
                assert name == "RAY_ADDRESS" or os.environ[name] == value
                environment.setenv(name, value)
            import ray

            ray.init(address=local.gcs_address, log_to_driver=False, logging_level="ERROR")
            yield RayCluster(home, settings, local)
            ray.shutdown()
        _check_end(local, home)
    finally:
        stop_local_cluster(home)
        shutil.rmtree(_FOLDER, ignore_errors=True)


def _check_end(local: LocalCluster, home: Path) -> None:
    """The cluster is stopped with everything that it started."""
    assert current_cluster(home) == local
    assert stop_local_cluster(home)
    assert current_cluster(home) is None
    assert not Path(local.temp_dir).exists()
    stats = [p.read_text().rpartition(")")[2].split() for p in Path("/proc").glob("[0-9]*/stat") if p.exists()]
    assert [state for state, _, _, session, *_ in stats if int(session) == local.pid and state != "Z"] == []


@pytest.fixture(scope="session")
def cluster_base(ray_cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    """The base of `served`."""
    return served_base(tmp_path_factory.mktemp("checkpoint"), ray_cluster.home)


@pytest.fixture(scope="session")
def served(ray_cluster: RayCluster, cluster_base: BaseModel) -> Iterator[Served]:
    from serve_apps.deployment import ServeApi, serve_config

    settings, base = ray_cluster.settings, cluster_base
    spec = ServeSpec(base=base.name, dtype="float32", port=free_port(), **SERVE)
    api = ServeApi(ray_cluster.address)
    api.deploy(serve_config(FleetSpec.of(spec), settings))
    *_, state = api.watch(timeout_s=120)
    assert state.is_running, state.message
    yield Served(
        url=f"http://{spec.host}:{spec.port}",
        base=base,
        store=AdapterStore(open_store(settings.store)),
        catalog=Catalog(settings.catalog),
        settings=settings,
        spec=spec,
    )
    api.delete()


@contextmanager
def deployed(
    cluster: RayCluster, served: Served, name: str, *, settings: Settings | None = None, **fields: Any
) -> Iterator[Served]:
    """Deploys another application `name` at `/name`, with ServeSpec's `fields`, and deletes it at the end.

    `settings` None: it has the home, catalog and store of `served`. It uses `serve.run`, because a config sent to
    Serve's REST API would replace the one of `served`.
    """
    from ray import serve

    from serve_apps.app import build

    spec = ServeSpec.model_validate(served.spec.model_dump() | fields)
    with pytest.MonkeyPatch.context() as environment:
        for variable, value in (settings or cluster.settings).to_env().items():
            environment.setenv(variable, value)
        application = build(spec.model_dump(mode="json"))
    try:
        serve.run(application, name=name, route_prefix=f"/{name}")
        yield replace(served, url=f"{served.url}/{name}", spec=spec)
    finally:
        serve.delete(name, _blocking=False)  # no test needs to wait until its replicas have ended


def served_base(folder: Path, home: Path) -> BaseModel:
    """The tiny random base of both servers, whose checkpoint is written to `folder`. Prompts with tools fit into its
    context, although each byte is a token.
    """
    from tests.tiny import write_checkpoint

    return add_base(str(write_checkpoint(folder, max_position_embeddings=4096)), home=home, name="tiny")


SERVE: dict[str, Any] = {
    "pool_bytes": 4 << 20,
    "max_num_seqs": 4,
    "max_queued": 4,
    "num_threads": 1,
    "drain_grace_s": 0.0,
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
