"""Adapter demand scales a real deployment: one request rate, over few adapters, then many, then few again."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from threading import Event, Thread
from typing import Any, NamedTuple

import httpx
import pytest

from loray.client import LorayClient
from loray.publishing import Destination, publish
from loray.schemas.status import Status
from tests.engine.adapters import make_adapter
from tests.fixtures.cluster import RayCluster, Served, deployed

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

NUM_ADAPTERS = 12
NUM_FEW = 3
RATE = 4.0  # requests per second, of MAX_TOKENS each: a low load, even for a slow machine
MAX_TOKENS = 2
POOL_BYTES = 1 << 20  # eight adapters of rank 32, at most
AUTOSCALING = {
    "min_replicas": 1,
    "max_replicas": 2,
    "window_s": 4.0,
    "upscale_delay_s": 0.5,
    "downscale_delay_s": 1.0,
}


@pytest.fixture(scope="module")
def adapters(served: Served, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    from peft import LoraConfig

    names = [f"scale-{i}" for i in range(NUM_ADAPTERS)]
    for seed, name in enumerate(names):
        folder = tmp_path_factory.mktemp("adapter") / name
        config = LoraConfig(r=32, lora_alpha=32, target_modules=["q_proj", "v_proj", "down_proj"])
        make_adapter(served.base, folder, config, seed=seed)
        publish(folder, served.base, Destination(name, served.store, served.catalog))
    return names


class Traffic:
    """Sends a short request every 1 / RATE s to `models` in turn, without waiting for earlier ones."""

    def __init__(self, url: str, models: Sequence[str]) -> None:
        self.models = models
        self.results: list[Future[httpx.Response]] = []
        self._stop = Event()
        self._http = httpx.Client(base_url=url, timeout=60)
        self._pool = ThreadPoolExecutor(32)
        self._thread = Thread(target=self._run)

    def _run(self) -> None:
        began = time.monotonic()
        for number in count(1):
            self.results.append(self._pool.submit(self._ask, self.models[number % len(self.models)]))
            if self._stop.wait(max(0.0, began + number / RATE - time.monotonic())):
                return

    def _ask(self, model: str) -> httpx.Response:
        body: dict[str, Any] = {"model": model, "prompt": "a", "max_tokens": MAX_TOKENS, "ignore_eos": True}
        return self._http.post("/v1/completions", json=body)

    @contextmanager
    def running(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._stop.set()
            self._thread.join()
            self._pool.shutdown()
            self._http.close()


def until(what: Callable[[], bool], timeout_s: float, why: Callable[[], object]) -> None:
    deadline = time.monotonic() + timeout_s
    while not what():
        assert time.monotonic() < deadline, why()
        time.sleep(0.1)


def test_a_wide_working_set_adds_a_replica_and_a_narrow_one_removes_it(
    ray_cluster: RayCluster, served: Served, adapters: list[str]
) -> None:
    fields = {"pool_bytes": POOL_BYTES, "max_num_seqs": 64, "max_queued": 64, "autoscaling": AUTOSCALING}
    few = adapters[:NUM_FEW]
    with deployed(ray_cluster, served, "scaled", **fields) as scaled, LorayClient(scaled.url) as client:
        traffic = Traffic(scaled.url, few)
        with traffic.running():

            def status() -> Status:
                return client.status()

            def explained(*words: str) -> bool:
                said = status().bases[0].autoscaling
                return said is not None and all(word in said.reason for word in words)

            # Few adapters: one replica is enough.
            until(lambda: explained(f" MiB of {NUM_FEW} adapters"), 20, status)
            sent = len(traffic.results)
            until(lambda: len(traffic.results) > sent + 2 * AUTOSCALING["window_s"] * RATE, 30, status)
            before = status()
            assert len(before.replicas) == 1

            # As many requests, over adapters that one pool does not hold.
            traffic.models = adapters
            until(lambda: len(status().replicas) == 2, 60, status)
            until(lambda: all(r.adapters_in_pool for r in status().replicas), 30, status)

            traffic.models = few
            until(lambda: len(status().replicas) == 1, 60, status)
            sent = len(traffic.results)
            until(lambda: len(traffic.results) > sent + RATE, 30, status)  # the remaining replica serves all requests
            told = status().bases[0].autoscaling
        statuses = {future.result().status_code for future in traffic.results}
    assert statuses == {200}
    assert told is not None
    more = next(d for d in told.decisions if (d.from_replicas, d.to_replicas) == (1, 2))
    fewer = next(d for d in reversed(told.decisions) if (d.from_replicas, d.to_replicas) == (2, 1))
    assert more.time < fewer.time
    wide, narrow = working_set(more.reason), working_set(fewer.reason)
    assert (wide.num_replicas, narrow.num_replicas) == (2, 1)
    assert wide.num_adapters > narrow.num_adapters >= NUM_FEW
    assert wide.mib >= wide.room_mib  # what one pool has for adapters; both are rounded
    assert narrow.mib <= narrow.room_mib
    assert decisions_in_controllers_log(ray_cluster) >= {more.reason, fewer.reason}


class WorkingSet(NamedTuple):
    mib: float
    num_adapters: int
    num_replicas: int
    room_mib: float


def working_set(reason: str) -> WorkingSet:
    """Parses the working set from a decision's reason."""
    said = re.search(
        r"working set ([\d.]+) MiB of (\d+) adapters needs (\d) replicas? at ([\d.]+) MiB of pool each", reason
    )
    assert said is not None, reason
    return WorkingSet(float(said[1]), int(said[2]), int(said[3]), float(said[4]))


def decisions_in_controllers_log(cluster: RayCluster) -> set[str]:
    logs = Path(cluster.local.temp_dir) / "session_latest" / "logs" / "serve"
    lines = [line for file in logs.glob("controller_*.log") for line in file.read_text().splitlines()]
    return {line.split(": ", 1)[1] for line in lines if " → " in line}
