"""A Ray cluster on this machine whose store is an S3 server that can be killed, and the product deployed on it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import httpx

from benchmarks.chaos.world import until
from benchmarks.cluster import world
from loray.catalog import Catalog
from loray.local.processes import LOOPBACK, free_ports
from loray.spec import FleetSpec, ServeSpec
from loray.store.s3 import create_bucket
from serve_apps.deployment import APPLICATION, serve_config
from tests.fixtures.s3 import started_s3
from tests.serve_apps.kills.processes import Bucket

LOAD_TIMEOUT_S = 10.0
_POOL_BYTES, _HOST_BYTES = 48 << 20, 16 << 20  # 200 adapters have 5.4 MB: a replica has room for all
_START_S = 180.0


@dataclass(frozen=True)
class World:
    """`names` are the adapters'; all are in `bucket`."""

    cluster: world.World
    bucket: Bucket
    num_replicas: int

    @property
    def names(self) -> list[str]:
        return self.cluster.names

    @property
    def catalog(self) -> Catalog:
        return Catalog(self.cluster.settings.catalog)

    @contextmanager
    def deployed(self) -> Iterator[int]:
        """The product's own application; yields its port."""
        (port,) = free_ports(1)
        spec = ServeSpec(
            base=world.BASE,
            dtype="float32",
            num_threads=1,
            num_replicas=self.num_replicas,
            pool_bytes=_POOL_BYTES,
            host_bytes=_HOST_BYTES,
            enable_prefix_caching=False,  # all prompts differ
            load_timeout_s=LOAD_TIMEOUT_S,
            port=port,
        )
        config = serve_config(FleetSpec.of(spec), self.cluster.settings)
        config["applications"] = [a for a in config["applications"] if a["name"] == APPLICATION]
        with self.cluster.running(config):
            url = f"http://{LOOPBACK}:{port}/health"
            until(lambda: httpx.get(url, timeout=30).status_code == 200, "the endpoint is healthy", _START_S)
            yield port


@contextmanager
def started(num_adapters: int, num_replicas: int, say: Callable[[str], None]) -> Iterator[World]:
    began = time.monotonic()

    def published() -> None:
        say(f"{num_adapters} adapters are published after {time.monotonic() - began:.0f} s; the cluster starts")

    with started_s3() as s3:
        location = s3.location("adapters")
        create_bucket(location)
        with world.started(num_adapters, num_replicas, {"LORAY_STORE": location.url}, published) as cluster:
            yield World(cluster, Bucket(s3, cluster.settings.store), num_replicas)
