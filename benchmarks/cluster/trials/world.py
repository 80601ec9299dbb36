"""A Ray cluster on this machine whose store is an S3 server that can be killed, and the product deployed on it."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.chaos.world import until
from benchmarks.copies import publish_copies
from loray.bases.registry import add_base
from loray.catalog import Catalog
from loray.local.cluster import LocalCluster, start_local_cluster, stop_local_cluster
from loray.local.processes import LOOPBACK, free_ports
from loray.settings import Settings
from loray.spec import FleetSpec, ServeSpec
from loray.store.s3 import create_bucket
from serve_apps.deployment import APPLICATION, ServeApi, serve_config
from tests.s3 import started_s3
from tests.serve_apps.kills.processes import Bucket

BASE = "tiny"
LOAD_TIMEOUT_S = 10.0
_RANK, _POOL_BYTES, _HOST_BYTES = 8, 48 << 20, 16 << 20  # 200 adapters have 5.4 MB: a replica has room for all
_QUICK = {"RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
_START_S = 180.0


@dataclass(frozen=True)
class World:
    """`names` are the adapters'; all are in `bucket`."""

    settings: Settings
    local: LocalCluster
    bucket: Bucket
    names: list[str]
    num_replicas: int

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.settings.catalog)

    @contextmanager
    def deployed(self) -> Iterator[int]:
        """The product's own application; yields its port."""
        (port,) = free_ports(1)
        spec = ServeSpec(
            base=BASE,
            dtype="float32",
            num_threads=1,
            num_replicas=self.num_replicas,
            pool_bytes=_POOL_BYTES,
            host_bytes=_HOST_BYTES,
            enable_prefix_caching=False,  # all prompts differ
            load_timeout_s=LOAD_TIMEOUT_S,
            port=port,
        )
        config = serve_config(FleetSpec.of(spec), self.settings)
        config["applications"] = [a for a in config["applications"] if a["name"] == APPLICATION]
        api = ServeApi(self.local.address)
        api.deploy(config)
        *_, state = api.watch(timeout_s=_START_S)
        if not state.is_running:
            raise SystemExit(f"the deployment failed: {state.reason}")
        url = f"http://{LOOPBACK}:{port}/health"
        until(lambda: httpx.get(url, timeout=30).status_code == 200, "the endpoint is healthy", _START_S)
        yield port


@contextmanager
def started(num_adapters: int, num_replicas: int, say: Callable[[str], None]) -> Iterator[World]:
    from peft import LoraConfig

    from tests.tiny import write_checkpoint

    began = time.monotonic()
    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="loray-trials-", ignore_cleanup_errors=True))
        )
        home, s3 = folder / "home", stack.enter_context(started_s3())
        location = s3.location("adapters")
        create_bucket(location)
        settings = Settings.from_env(
            {"LORAY_HOME": str(home), "LORAY_STORE": location.url, "LORAY_LOG_LEVEL": "WARNING"}
        )
        base = add_base(
            str(write_checkpoint(folder / "checkpoint", max_position_embeddings=4096)), home=home, name=BASE
        )
        config = LoraConfig(r=_RANK, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
        names = publish_copies(folder, base, settings, [config], num_adapters)
        say(f"{num_adapters} adapters are published after {time.monotonic() - began:.0f} s; the cluster starts")
        local = start_local_cluster(home, num_cpus=num_replicas + 1, env=settings.to_env() | _QUICK)
        stack.callback(stop_local_cluster, home)
        os.environ.update(local.client_env)  # before Ray is imported
        yield World(settings, local, Bucket(s3, settings.store), names, num_replicas)
