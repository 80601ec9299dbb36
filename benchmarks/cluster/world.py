"""A Ray cluster on this machine with replicas of a tiny model, and thousands of tiny adapters published for it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx

from benchmarks.chaos.world import until
from benchmarks.copies import publish_copies
from loray.bases.registry import add_base
from loray.catalog import Catalog
from loray.client.metrics import Metrics
from loray.local.cluster import LocalCluster, start_local_cluster, stop_local_cluster
from loray.local.processes import LOOPBACK, free_ports
from loray.settings import Settings
from loray.spec import EngineFigures, FleetSpec, ServeSpec
from serve_apps.deployment import APPLICATION, ServeApi, serve_config

BASE = "tiny"
CONTEXT = 4096
_RANK, _KV_BYTES = 8, 8 << 20
_QUICK = {"RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "0.1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
_START_S = 180.0
_LOADS = "loray_adapter_load_seconds"


@dataclass(frozen=True)
class World:
    """`names` are the adapters'; `total_bytes` what they have together, as published."""

    folder: Path
    settings: Settings
    local: LocalCluster
    names: list[str]
    total_bytes: int

    def spec(self, num_replicas: int, held: float) -> ServeSpec:
        """A replica's pool, and its host memory, each hold the share `held` of all adapters."""
        host_bytes = int(held * self.total_bytes)
        return ServeSpec(
            base=BASE,
            dtype="float32",
            num_threads=1,
            num_replicas=num_replicas,
            pool_bytes=host_bytes + _KV_BYTES,
            host_bytes=host_bytes,
            enable_prefix_caching=False,  # all prompts differ
            warm_start_s=0,  # else new replicas would begin with what the last router's requests were for
            port=free_ports(1)[0],
        )

    @contextmanager
    def deployed(self, spec: ServeSpec, router: str) -> Iterator[Path]:
        """New replicas behind this router; yields the file of its decisions."""
        record = self.folder / f"{router}.jsonl"
        record.touch()
        config = serve_config(FleetSpec.of(spec), self.settings)
        config["applications"] = [a for a in config["applications"] if a["name"] == APPLICATION]
        config["applications"][0] |= {
            "import_path": "benchmarks.cluster.application:build",
            "args": {"fleet": FleetSpec.of(spec).to_args(), "router": router, "record": str(record)},
        }
        with self.running(config):
            until(lambda: len(figures(spec.port)) == spec.num_replicas, "all replicas answer", _START_S)
            yield record

    @contextmanager
    def running(self, config: dict[str, Any]) -> Iterator[None]:
        """The applications of a configuration of Serve, until the block ends."""
        api = ServeApi(self.local.address)
        api.deploy(config)
        *_, state = api.watch(timeout_s=_START_S)
        try:
            if not state.is_running:
                raise SystemExit(f"the deployment failed: {state.reason}")
            yield
        finally:
            api.delete()
            until(lambda: api.state() is None, "the deployment is deleted", _START_S)


class Figures(EngineFigures):
    """Of one replica, from GET /status."""

    replica: str
    adapters_in_pool: tuple[str, ...] = ()
    adapters_on_host: tuple[str, ...] = ()


def figures(port: int) -> list[Figures]:
    """Of all replicas that answer, by name."""
    response = httpx.get(f"http://{LOOPBACK}:{port}/status", timeout=30)
    found = [Figures(**replica) for replica in response.json()["replicas"]] if response.status_code == 200 else []
    return sorted(found, key=lambda figures: figures.replica)


def load_seconds(port: int) -> tuple[float, float]:
    """Of all loads of adapters since the start: seconds, and their number."""
    text = httpx.get(f"http://{LOOPBACK}:{port}/metrics", timeout=30).raise_for_status().text
    metrics = Metrics(text, (_LOADS, f"# TYPE {_LOADS}"))
    return tuple(sum(metrics.sums(f"{_LOADS}_{what}", "replica").values()) for what in ("sum", "count"))  # type: ignore[return-value]


def adapter_config() -> Any:
    """PEFT's, of every adapter."""
    from peft import LoraConfig

    return LoraConfig(r=_RANK, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])


@contextmanager
def started(
    num_adapters: int,
    num_replicas: int,
    environment: Mapping[str, str] = MappingProxyType({}),
    published: Callable[[], None] = lambda: None,
) -> Iterator[World]:
    """`environment`: further settings, as the store's; `published` is called before the cluster starts."""
    from tests.fixtures.tiny import write_checkpoint

    with ExitStack() as stack:
        folder = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="loray-cluster-", ignore_cleanup_errors=True))
        )
        home = folder / "home"
        settings = Settings.from_env({"LORAY_HOME": str(home), "LORAY_LOG_LEVEL": "WARNING", **environment})
        checkpoint = write_checkpoint(folder / "checkpoint", max_position_embeddings=CONTEXT)
        base = add_base(str(checkpoint), home=home, name=BASE)
        names = publish_copies(folder, base, settings, [adapter_config()], num_adapters)
        published()
        total = num_adapters * Catalog(settings.catalog).resolve(names[0]).nbytes
        local = start_local_cluster(home, num_cpus=num_replicas + 1, env=settings.to_env() | _QUICK)
        stack.callback(stop_local_cluster, home)
        os.environ.update(local.client_env)  # before Ray is imported
        yield World(folder, settings, local, names, total)
