"""Routing by adapter against Ray Serve's default router (power of two choices): the same requests over HTTP, to both.

    python -m benchmarks.serving.routing [--replicas 2] [--adapters 20] [--requests 200] [--json FILE]

The benchmark starts a Ray cluster on this machine, and new replicas of SmolLM2-135M for each row; the rows run in both
orders. The adapters have rank 8, 16, 32, 64 in turn on q, k, v, o. A replica's pool and its host memory each hold 70 %
of their bytes. After one uncounted request for every adapter, the requests are for adapters drawn at random, with
`--at-once` of them under way at any time: prompts of 32 tokens, 8 output tokens, streamed.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import httpx

from benchmarks.machine import describe_machine, load_average
from benchmarks.options import one_or_more
from benchmarks.output import machine_line, write_json
from benchmarks.serving.adapters import AdapterSet, write_adapter
from benchmarks.serving.models import bench_base
from loray.bases.registry import BaseModel
from loray.catalog import Catalog
from loray.local.cluster import start_local_cluster, stop_local_cluster
from loray.local.processes import free_ports
from loray.publishing import Destination, publish
from loray.settings import Settings
from loray.spec import FleetSpec, ServeSpec
from loray.store import AdapterStore, open_store

PROMPT, NEW_TOKENS = "word " * 32, 8
HELD = 0.7  # share of all adapters' bytes that a replica's pool, and its host memory, can hold
KV_BYTES = 16 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicas", type=one_or_more, default=2)
    parser.add_argument("--adapters", type=one_or_more, default=20)
    parser.add_argument("--requests", type=one_or_more, default=200)
    parser.add_argument("--at-once", type=one_or_more, default=4)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        settings = Settings.from_env({"LORAY_HOME": str(home), "LORAY_LOG_LEVEL": "WARNING"})
        os.environ.update(settings.to_env())
        base = bench_base()
        for i in range(args.adapters):
            write_adapter(Path(folder) / f"a{i}", base, AdapterSet(args.adapters), i)
        models = [_publish(settings, base, Path(folder) / f"a{i}") for i in range(args.adapters)]
        cluster = start_local_cluster(home, num_cpus=args.replicas + 1, env=settings.to_env())
        try:
            os.environ.update(cluster.client_env)
            results = _compare(cluster.gcs_address, models, args)
        finally:
            stop_local_cluster(home)
    write_json(args.json, results)


def _publish(settings: Settings, base: BaseModel, folder: Path) -> tuple[str, int]:
    """Publish the adapter in `folder`; returns its name and bytes."""
    store, catalog = AdapterStore(open_store(settings.store)), Catalog(settings.catalog)
    publish(folder, base, Destination(folder.name, store, catalog))
    return folder.name, catalog.resolve(folder.name).nbytes


def _compare(gcs_address: str, models: list[tuple[str, int]], args: argparse.Namespace) -> Any:
    import ray
    from ray import serve
    from ray.serve.config import RequestRouterConfig

    from serve_apps import app

    port, total = free_ports(1)[0], sum(nbytes for _, nbytes in models)
    held = int(HELD * total)
    spec = ServeSpec(num_replicas=args.replicas, pool_bytes=held + KV_BYTES, host_bytes=held, num_threads=1)
    systems: dict[str, Callable[[], Any]] = {
        "loray": lambda: app.build(spec.model_dump(mode="json")),
        "Ray's default": lambda: app.application(FleetSpec.of(spec), RequestRouterConfig()),
    }
    machine = describe_machine()
    click.echo(machine_line(machine, ray=ray.__version__))
    click.echo(
        f"{args.replicas} replicas, {args.adapters} adapters of {total / 1e6:.0f} MB together, "
        f"{args.requests} requests, {args.at_once} at once"
    )
    click.echo(f"{'router':<14}  in pool  on host   loaded  p50 TTFT  p99 TTFT  load before  requests by replica")
    ray.init(address=gcs_address, log_to_driver=False, logging_level="ERROR")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    rows = []
    for name in (*systems, *reversed(systems)):  # twice, in both orders
        serve.run(systems[name](), name="bench", route_prefix="/bench")
        load = load_average()
        row = _measure(f"http://127.0.0.1:{port}/bench", [model for model, _ in models], args.requests, args.at_once)
        serve.delete("bench")
        rows.append({"router": name, "load_before": load} | row)
        click.echo(
            f"{name:<14} {row['pool']:>8.1%} {row['host']:>8.1%} {row['miss']:>8.1%} {row['p50'] * 1e3:>6.0f} ms "
            f"{row['p99'] * 1e3:>6.0f} ms  {load:>11.2f}  {' '.join(map(str, row['served']))}"
        )
    ray.shutdown()
    return {"machine": machine, "adapters": args.adapters, "at_once": args.at_once, "rows": rows}


def _measure(url: str, models: Sequence[str], num_requests: int, at_once: int) -> dict[str, Any]:
    draw = random.Random(0)
    for model in draw.sample(models, len(models)):
        _time_to_first_token(url, model)
    before = _replicas(url)
    with ThreadPoolExecutor(at_once) as pool:
        times = list(pool.map(lambda model: _time_to_first_token(url, model), draw.choices(models, k=num_requests)))
    after = _replicas(url)

    def counts(field: str) -> list[int]:
        return [now[field] - then[field] for now, then in zip(after, before, strict=True)]

    kinds = {"pool": "num_pool_hits", "host": "num_host_hits", "miss": "num_misses"}
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    shares = {kind: sum(counts(field)) / num_requests for kind, field in kinds.items()}
    return shares | {"p50": cuts[49], "p99": cuts[98], "served": counts("num_finished")}


def _time_to_first_token(url: str, model: str) -> float:
    body = {"model": model, "prompt": PROMPT, "max_tokens": NEW_TOKENS, "ignore_eos": True, "stream": True}
    begun = time.perf_counter()
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=120) as response:
        response.raise_for_status()
        lines = response.iter_lines()
        next(line for line in lines if line.startswith("data:"))
        seconds = time.perf_counter() - begun
        for _ in lines:
            pass
    return seconds


def _replicas(url: str) -> list[dict[str, Any]]:
    replicas: list[dict[str, Any]] = httpx.get(f"{url}/status", timeout=30).json()["replicas"]
    return sorted(replicas, key=lambda r: str(r["replica"]))


if __name__ == "__main__":
    main()
