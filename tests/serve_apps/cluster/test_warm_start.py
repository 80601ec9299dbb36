"""A replica that is replaced has the adapters in demand before it takes requests."""

from __future__ import annotations

import os
import re
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from loray.publishing import Destination, publish
from loray.store import AdapterStore, open_store
from tests.fixtures.asking import eventually, status
from tests.fixtures.cluster import RayCluster, Served, deployed
from tests.fixtures.peft_adapters import make_adapter

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

MODELS = [f"warm-{number}" for number in range(6)]


@pytest.fixture
def published(served: Served, tmp_path: Path) -> None:
    from peft import LoraConfig

    store = AdapterStore(open_store(served.settings.store))
    for seed, name in enumerate(MODELS):
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        make_adapter(served.base, tmp_path / name, config, seed=seed, std=0.3)
        publish(tmp_path / name, served.base, Destination(name, store, served.catalog))


def ask(url: str, model: str, **fields: Any) -> str:
    body: dict[str, Any] = {"model": model, "prompt": "What is it?", "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body | {"max_tokens": 8} | fields, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def flood(url: str, model: str) -> set[str]:
    """So many requests at once that both replicas get some."""
    with ThreadPoolExecutor(16) as pool:
        return set(pool.map(lambda _: ask(url, model, max_tokens=24), range(16)))


def warm_adapters(url: str) -> dict[str, int]:
    """By outcome: the sum over replicas."""
    text, found = httpx.get(f"{url}/metrics", timeout=30).text, dict[str, int]()
    for labels, value in re.findall(r"^loray_warm_start_adapters{(.*)} (\S+)$", text, re.MULTILINE):
        (own,) = (v for k, v in re.findall(r'(\w+)="([^"]*)"', labels) if k not in ("replica", "base"))
        found[own] = found.get(own, 0) + int(float(value))
    return found


def held_by(app: Served) -> dict[str, int]:
    """By replica: how many adapters it has in the pool or on the host."""
    return {r["replica"]: len(r["adapters_in_pool"]) + len(r["adapters_on_host"]) for r in status(app)["replicas"]}


def test_a_replica_that_is_replaced_begins_with_adapters(
    ray_cluster: RayCluster, served: Served, published: None
) -> None:
    fields: dict[str, Any] = {"num_replicas": 2, "max_num_seqs": 8, "max_queued": 64, "load_timeout_s": 30.0}
    with deployed(ray_cluster, served, "warm", **fields, warm_start_s=30.0) as app:  # on a busy machine
        answers = {model: ask(app.url, model) for model in MODELS}
        for model in MODELS:
            assert len(flood(app.url, model)) == 1
        before = held_by(app)
        dead = status(app)["replicas"][0]
        os.kill(dead["pid"], signal.SIGKILL)
        assert eventually(lambda: len(held_by(app)) == 2 and dead["replica"] not in held_by(app), 60)
        new = next(r for r in status(app)["replicas"] if r["replica"] not in before)
        warm = warm_adapters(app.url)
        assert warm["pool"] >= 1
        assert warm["failed"] == warm["late"] == 0
        assert len(new["adapters_in_pool"]) == warm["pool"]
        assert {model: ask(app.url, model) for model in MODELS} == answers
