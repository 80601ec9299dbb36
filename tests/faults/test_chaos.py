"""Hundreds of random requests over HTTP to both servers. Clients leave, read slowly or not at all, and behind Ray Serve
gateways and replicas are killed. Every answer is right or says why there is none, and nothing is left behind.

CHAOS_REQUESTS and CHAOS_SEED make another run of it.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import httpx
import pytest

from loray.publishing import Destination, publish
from loray.spec import GATEWAY, engine_of
from serve_apps.deployment import ServeApi
from tests.faults import spy
from tests.faults.requests import COMPLETIONS, Kind, make_kinds, undisturbed
from tests.faults.run import Run
from tests.faults.spy import Held
from tests.fixtures.asking import eventually, status
from tests.fixtures.cluster import RayCluster, Served, deployed
from tests.fixtures.peft_adapters import make_adapter
from tests.fixtures.standalone import standalone

NUM_REQUESTS = int(os.environ.get("CHAOS_REQUESTS", "300"))
SEED = int(os.environ.get("CHAOS_SEED", "0"))
KILL_EVERY = 100
NUM_ADAPTERS = 6
NAME, ENGINE = "chaos", engine_of("tiny")
# A pool that holds a part of the adapters and requests, so that they are evicted and preempted.
SPEC = {"pool_bytes": 640 << 10, "host_bytes": 80_000, "max_num_seqs": 8, "max_queued": 24, "sse_heartbeat_s": 0.2}
_REPLACED_S = 120.0
_MAIN = """
import sys
from pathlib import Path
sys.path.append({root!r})
from tests.faults import spy
spy.answer_signals(Path({file!r}))
from loray.cli.main import main
main()
"""

pytestmark = pytest.mark.slow


class Place(Protocol):
    """A server. `num_connections`: between gateways and replicas, as each process of them counts its own."""

    served: Served
    num_connections: int

    def held(self, *, emptied: bool) -> dict[str, Held]:
        """What each process holds, by its kind and pid."""

    def private_files(self) -> Counter[str]:
        """The files and sockets of this server alone, without the numbers in their names."""


@dataclass
class Alone:
    """`loray serve`. Its process answers signals, see `spy`."""

    served: Served
    pid: int
    file: Path
    num_connections: int = 0

    def held(self, *, emptied: bool) -> dict[str, Held]:
        self.file.unlink(missing_ok=True)
        os.kill(self.pid, signal.SIGUSR2 if emptied else signal.SIGUSR1)
        assert eventually(self.file.exists, 60)
        found = json.loads(self.file.read_text())
        assert isinstance(found, dict), found
        return {f"serve {self.pid}": found}

    def private_files(self) -> Counter[str]:
        return _files(self.served.settings.home)


@dataclass
class Cluster:
    """An application on Ray Serve."""

    ray: RayCluster
    served: Served
    num_connections: int = 2
    killed: set[int] = field(default_factory=set)

    def held(self, *, emptied: bool) -> dict[str, Held]:
        import ray

        ray.cloudpickle.register_pickle_by_value(spy)  # the replicas cannot import tests
        try:
            found = spy.each([NAME], lambda kind: partial(spy.of_replica, emptied=emptied and kind == ENGINE))
            return {process.removeprefix(f"{NAME} "): held for process, held in found.items()}
        finally:
            ray.cloudpickle.unregister_pickle_by_value(spy)

    async def strike(self, rng: random.Random) -> None:
        """Ends a gateway and a replica by SIGKILL, and waits until they have been replaced."""
        pids = [rng.choice(await asyncio.to_thread(self._running, kind)) for kind in (GATEWAY, ENGINE)]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.killed.update(pids)
        await asyncio.to_thread(self.wait_until_whole)

    def wait_until_whole(self) -> None:
        assert eventually(self._is_whole, _REPLACED_S), "a killed process was not replaced"

    def _is_whole(self) -> bool:
        """Also for the proxy, which has heard of new gateways when each has answered."""
        gateways, replicas = self._running(GATEWAY), self._running(ENGINE)
        if len(gateways) != 2 or len(replicas) != 2 or {*gateways, *replicas} & self.killed:
            return False
        try:
            return len(httpx.get(f"{self.served.url}/status", timeout=30).json()["replicas"]) == 2
        except (httpx.HTTPError, ValueError):
            return False

    def private_files(self) -> Counter[str]:
        return _files(Path(f"{self.ray.local.temp_dir}-http")) + _files(self.ray.home)

    def _running(self, kind: str) -> list[int]:
        applications: dict[str, Any] = ServeApi(self.ray.address)._details()["applications"]
        replicas = applications[NAME]["deployments"][kind]["replicas"]
        return sorted(r["pid"] for r in replicas if r["state"] == "RUNNING")


def _files(folder: Path) -> Counter[str]:
    """Logs and what a catalog's database writes beside itself are no leftovers."""
    return Counter(
        re.sub(r"[0-9a-f]{8,}|[0-9]+", "*", str(p.relative_to(folder)))
        for p in folder.rglob("*")
        if not p.is_dir() and not p.name.endswith((".log", ".err", ".out", "-wal", "-shm", "-journal"))
    )


@pytest.fixture(scope="module", params=["serve", pytest.param("up", marks=pytest.mark.cluster)])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    if request.param == "serve":
        folder = tmp_path_factory.mktemp("chaos")
        file = folder / "held.json"
        main = _MAIN.format(root=str(request.config.rootpath), file=str(file))
        with standalone(folder, main=main, **SPEC) as server:
            yield Alone(server.served, server.process.pid, file)
            assert server.end() == 0
            assert "Traceback" not in server.log
        return
    cluster: RayCluster = request.getfixturevalue("ray_cluster")
    served: Served = request.getfixturevalue("served")
    with deployed(cluster, served, NAME, num_gateways=2, num_replicas=2, **SPEC) as app:
        place = Cluster(cluster, app)
        place.wait_until_whole()
        yield place


@pytest.fixture(scope="module")
def models(place: Place, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    from peft import LoraConfig, VeraConfig

    base, labels = place.served.base, []
    for i in range(NUM_ADAPTERS):
        folder = tmp_path_factory.mktemp("adapter") / f"chaos-{i}"
        config = LoraConfig(r=4 + 4 * (i % 3), lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
        if i == 0:
            config = VeraConfig(r=16, target_modules=["q_proj", "v_proj"], save_projection=False)
        make_adapter(base, folder, config, seed=i, std=0.3)
        labels.append(publish(folder, base, Destination(folder.name, place.served.store, place.served.catalog)).label)
    return ["tiny", *labels]


def is_idle(place: Place) -> bool:
    totals = status(place.served)["totals"]
    return not (totals["num_running"] or totals["num_waiting"] or totals["num_loading"] or totals["blocks"]["kv"])


def most_by_kind(held: dict[str, Held]) -> dict[str, Held]:
    """For each kind of process the most that one holds."""
    most: dict[str, Held] = {}
    for process, figures in held.items():
        known = most.setdefault(process.split()[0], {})
        known |= {name: max(n, known.get(name, 0)) for name, n in figures.items()}
    return most


def left(place: Place, before: dict[str, Held]) -> dict[str, Held]:
    """What processes hold of requests and connections, and what they hold more than before."""
    all_have_met = [Kind(COMPLETIONS, {"model": "tiny", "prompt": "a"})] * 20
    asyncio.run(undisturbed(place.served.url, all_have_met, {}))
    found: dict[str, Held] = {}
    for process, held in place.held(emptied=True).items():
        usual = before[process.split()[0]] | {"requests": 0, "blocks": 0, "connections": place.num_connections}
        more = {name: n for name, n in held.items() if n > usual.get(name, 0)}
        if held["connections"] != place.num_connections:
            more["connections"] = held["connections"]
        if more:
            found[process] = more
    return found


def test_none_lost_none_wrong_nothing_left(place: Place, models: list[str]) -> None:
    kinds = make_kinds(models, 80, random.Random(0))
    run = Run(place.served.url, kinds, asyncio.run(undisturbed(place.served.url, kinds, {})))
    assert eventually(lambda: is_idle(place))
    before, files = most_by_kind(place.held(emptied=False)), place.private_files()

    strike = partial(place.strike, random.Random(SEED + 1)) if isinstance(place, Cluster) else None
    asyncio.run(run.all(NUM_REQUESTS, SEED, KILL_EVERY, strike))
    if isinstance(place, Cluster):
        place.wait_until_whole()
    totals = status(place.served)["totals"]
    print(dict(run.verdicts), len(run.windows), totals)
    assert not run.wrong, "\n".join(run.wrong[:10])
    assert run.verdicts.total() == NUM_REQUESTS
    if isinstance(place, Cluster):
        assert run.windows
    else:  # a replaced replica has no totals
        assert totals["num_evictions"] * totals["num_host_evictions"] > 0

    assert eventually(lambda: is_idle(place), 60)
    assert eventually(lambda: not left(place, before), 60), str(left(place, before))
    assert eventually(lambda: place.private_files() <= files), place.private_files() - files
