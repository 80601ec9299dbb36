"""Two replicas and twenty adapters, too many for one of them: requests go to the replica that holds their adapter."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from loray.publishing import Destination, publish
from tests.engine.adapters import make_adapter
from tests.fixtures.cluster import RayCluster, Served, deployed

pytestmark = pytest.mark.cluster

NUM_ADAPTERS = 20
AT_ONCE = 4
# An adapter takes 4 blocks of 8 KiB in the pool and 26 KiB on the host: one replica has room for 15 or so.
SPEC: dict[str, Any] = {
    "num_replicas": 2,
    "pool_bytes": 72 * (8 << 10),
    "host_bytes": 400 << 10,
    "max_num_seqs": 4 * AT_ONCE,
    "max_queued": 64,
}


@pytest.fixture(scope="module")
def app(ray_cluster: RayCluster, served: Served) -> Iterator[Served]:
    with deployed(ray_cluster, served, "routing", **SPEC) as app:
        yield app


@pytest.fixture(scope="module")
def models(served: Served, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    from peft import LoraConfig

    for seed in range(NUM_ADAPTERS):
        folder = tmp_path_factory.mktemp("adapter")
        config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
        make_adapter(served.base, folder, config, seed=seed, std=0.3)
        publish(folder, served.base, Destination(f"r{seed}", served.store, served.catalog))
    return [f"r{seed}" for seed in range(NUM_ADAPTERS)]


class Client:
    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def ask(self, model: str, **fields: Any) -> list[str]:
        body = {"model": model, "prompt": "What is it?", "temperature": 0, "max_tokens": 8, "ignore_eos": True} | fields
        response = self._http.post("/v1/completions", json=body)
        response.raise_for_status()
        return [choice["text"] for choice in response.json()["choices"]]

    def ask_all(self, models: Sequence[str], at_once: int, **fields: Any) -> list[list[str]]:
        with ThreadPoolExecutor(at_once) as pool:
            return list(pool.map(lambda model: self.ask(model, **fields), models))

    def replicas(self) -> dict[str, dict[str, Any]]:
        response = self._http.get("/status")
        response.raise_for_status()
        return {replica["replica"]: replica for replica in response.json()["replicas"]}

    def num_routed(self) -> dict[str, int]:
        """Routed requests by reason, since the gateway's start."""
        pattern = re.compile(
            r'^loray_routing_decisions_total{base="tiny",gateway="\w+",reason="(\w+)"} (\d+)', re.MULTILINE
        )
        return {reason: int(n) for reason, n in pattern.findall(self.metrics())}

    def metrics(self) -> str:
        return self._http.get("/metrics").raise_for_status().text

    def since(self, before: dict[str, dict[str, Any]], field: str) -> dict[str, int]:
        return {name: now[field] - before.get(name, {field: 0})[field] for name, now in self.replicas().items()}


@pytest.fixture(scope="module")
def client(app: Served) -> Iterator[Client]:
    with httpx.Client(base_url=app.url, timeout=60) as http:
        yield Client(http)


def test_repeated_requests_find_the_replica_that_holds_their_adapter(client: Client, models: list[str]) -> None:
    answers = dict(zip(models, client.ask_all(models, at_once=1), strict=True))
    assert len({text for (text,) in answers.values()}) == NUM_ADAPTERS  # every adapter has its own output
    before, order = client.replicas(), random.Random(0)
    traffic = [order.sample(models, len(models)) for _ in range(6)]
    for i, part in enumerate(traffic):
        again = client.ask_all(part, at_once=AT_ONCE if i % 2 else 1)
        assert again == [answers[model] for model in part]
    misses, served = client.since(before, "num_misses"), client.since(before, "num_finished")
    num_requests = sum(map(len, traffic))
    hit_share = 1 - sum(misses.values()) / num_requests
    print(f"{hit_share:.1%} of {num_requests} repeated requests found their adapter; served: {sorted(served.values())}")
    assert sum(served.values()) == num_requests
    assert hit_share >= 0.9
    routed = client.num_routed()
    assert routed["pool"] + routed["host"] + routed["recent"] >= 0.9 * num_requests
    assert sum(routed.values()) == num_requests + NUM_ADAPTERS
    assert min(served.values()) >= num_requests / 4


def test_replicas_report_what_they_hold(client: Client, models: list[str]) -> None:
    """Otherwise the gateway knows of an adapter only what it has sent itself."""
    before, deadline = client.num_routed()["pool"], time.monotonic() + 60
    while client.num_routed()["pool"] == before:
        assert time.monotonic() < deadline
        client.ask(models[0], max_tokens=1)


def test_choices_of_one_request_are_routed_each(client: Client, models: list[str]) -> None:
    """All choices have the same HTTP request's id in Serve."""
    prompts = ["a", "b", "c"]
    texts = client.ask(models[0], prompt=prompts, n=2)
    assert len(texts) == 6
    assert texts[::2] == [text for p in prompts for text in client.ask(models[0], prompt=p)]


def test_one_adapter_in_demand_spreads_over_both(client: Client, models: list[str]) -> None:
    before = client.replicas()
    client.ask_all([models[0]] * 32, at_once=16, max_tokens=64)
    served = client.since(before, "num_finished")
    assert sum(served.values()) == 32
    assert min(served.values()) >= 4


def test_a_replica_that_does_not_answer_is_missing_from_the_metrics_and_counted(client: Client) -> None:
    silent, other = client.replicas().values()
    os.kill(silent["pid"], signal.SIGSTOP)
    try:
        text = client.metrics()
    finally:
        os.kill(silent["pid"], signal.SIGCONT)
    assert f'loray_engine_steps_total{{base="tiny",replica="{other["replica"]}"}}' in text
    assert silent["replica"] not in text
    assert '\nloray_replicas_reporting{base="tiny"} 1.0\nloray_replicas_silent{base="tiny"} 1.0\n' in re.sub(
        "# .*\n", "", text
    )


def test_what_a_dead_replica_held_the_other_serves(client: Client, models: list[str]) -> None:
    answers = client.ask_all(models, at_once=1)
    dead, _ = client.replicas().values()
    os.kill(dead["pid"], signal.SIGKILL)
    assert client.ask_all(models, at_once=AT_ONCE) == answers
