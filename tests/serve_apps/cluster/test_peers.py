"""Two replicas whose nodes have caches of their own, and a store that is killed: what one has, all can serve; and a
replica that is replaced has it before it takes requests.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from loray.local.s3 import LocalS3
from loray.publishing import Destination, publish
from loray.settings import Settings
from loray.spec import ServeSpec
from loray.store import AdapterStore, open_store
from loray.store.s3 import create_bucket
from serve_apps import app as application
from serve_apps.replica.replica import EngineReplica
from tests.engine.adapters import make_adapter
from tests.fixtures.cluster import RayCluster, Served, deployed
from tests.fixtures.s3 import started_s3
from tests.serve_apps.asking import eventually, status

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

MODELS = [f"peer-{number}" for number in range(6)]


def on_its_own_node() -> type[EngineReplica]:
    """A replica with a home of its own, in which the node's cache is. Pickled by value, as it is made here."""

    class OnItsOwnNode(EngineReplica):
        def __init__(self, spec: ServeSpec) -> None:
            home = Path(os.environ["LORAY_HOME"])
            own = home / f"node-{os.getpid()}"
            own.mkdir()
            (own / "bases").symlink_to(home / "bases")
            os.environ["LORAY_HOME"] = str(own)
            super().__init__(spec)

    return OnItsOwnNode


@pytest.fixture
def s3() -> Iterator[LocalS3]:
    with started_s3() as server:
        yield server


@pytest.fixture
def settings(served: Served, s3: LocalS3, tmp_path: Path) -> Settings:
    """Those of a deployment whose store is `s3`, with the adapters in it."""
    from peft import LoraConfig

    location = s3.location("adapters")
    create_bucket(location)
    settings = replace(served.settings, store=location.url)
    for seed, name in enumerate(MODELS):
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        make_adapter(served.base, tmp_path / name, config, seed=seed, std=0.3)
        publish(tmp_path / name, served.base, Destination(name, AdapterStore(open_store(location.url)), served.catalog))
    return settings


def ask(url: str, model: str, **fields: Any) -> str:
    body: dict[str, Any] = {"model": model, "prompt": "What is it?", "temperature": 0, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body | {"max_tokens": 8} | fields, timeout=60)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["choices"][0]["text"])


def flood(url: str, model: str) -> set[str]:
    """So many requests at once that both replicas get some."""
    with ThreadPoolExecutor(16) as pool:
        return set(pool.map(lambda _: ask(url, model, max_tokens=24), range(16)))


def counted(url: str, metric: str) -> dict[str, int]:
    """By the value of the metric's own label: the sum over replicas."""
    text, found = httpx.get(f"{url}/metrics", timeout=30).text, dict[str, int]()
    for labels, value in re.findall(rf"^{metric}{{(.*)}} (\S+)$", text, re.MULTILINE):
        (own,) = (v for k, v in re.findall(r'(\w+)="([^"]*)"', labels) if k not in ("replica", "base"))
        found[own] = found.get(own, 0) + int(float(value))
    return found


def held_by(app: Served) -> dict[str, int]:
    """By replica: how many adapters it has in the pool or on the host."""
    return {r["replica"]: len(r["adapters_in_pool"]) + len(r["adapters_on_host"]) for r in status(app)["replicas"]}


def test_adapters_come_from_another_replica_while_the_store_is_away(
    ray_cluster: RayCluster, served: Served, settings: Settings, s3: LocalS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(application, "EngineReplica", on_its_own_node())
    fields: dict[str, Any] = {"num_replicas": 2, "max_num_seqs": 8, "max_queued": 64, "load_timeout_s": 30.0}
    fields |= {"peer_timeout_s": 20.0, "warm_start_s": 30.0}  # on a busy machine
    with deployed(ray_cluster, served, "peers", settings=settings, **fields) as app:
        answers = {model: ask(app.url, model) for model in MODELS}
        assert counted(app.url, "loray_adapter_sources_total") == {"cache": 0, "peer": 0, "store": len(MODELS)}
        cached = "node-*/cache/adapters/*/packed*"  # is written in the background, and then given to others
        assert eventually(lambda: len([*settings.home.glob(cached)]) == len(MODELS), 30)
        os.kill(s3.pid, signal.SIGKILL)

        for model in MODELS:
            assert len(flood(app.url, model)) == 1
        assert all(n == len(MODELS) for n in held_by(app).values()), status(app)["replicas"]
        sources = counted(app.url, "loray_adapter_sources_total")
        assert sources["peer"] == len(MODELS)
        assert counted(app.url, "loray_adapter_peer_answers_total")["given"] == len(MODELS)
        assert {model: ask(app.url, model) for model in MODELS} == answers

        before = held_by(app)
        dead = status(app)["replicas"][0]
        os.kill(dead["pid"], signal.SIGKILL)
        assert eventually(lambda: len(held_by(app)) == 2 and dead["replica"] not in held_by(app), 60)
        new = next(r for r in status(app)["replicas"] if r["replica"] not in before)
        warm = counted(app.url, "loray_warm_start_adapters")
        print(f"a warm start: {warm}, {counted(app.url, 'loray_adapter_sources_total')}")
        assert warm["pool"] >= 1
        assert warm["failed"] == warm["late"] == 0
        assert len(new["adapters_in_pool"]) == warm["pool"]
        for model in MODELS:
            assert flood(app.url, model)
        assert {model: ask(app.url, model) for model in MODELS} == answers
