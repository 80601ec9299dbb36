"""Hundreds of random requests over HTTP to both servers. Clients leave, read slowly or not at all, and behind Ray Serve
gateways and replicas are killed. Every answer is right or says why there is none, and nothing is left behind.

CHAOS_REQUESTS and CHAOS_SEED make another run of it.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Iterator

import pytest

from loray.publishing import Destination, publish
from tests.engine.adapters import make_adapter
from tests.fixtures.cluster import RayCluster, Served, deployed
from tests.fixtures.standalone import standalone
from tests.serve_apps.asking import eventually, status
from tests.serve_apps.chaos.kinds import Kind, make_kinds
from tests.serve_apps.chaos.places import Alone, Cluster, Held, Place, wait_until_whole
from tests.serve_apps.chaos.run import Run, undisturbed

NUM_REQUESTS = int(os.environ.get("CHAOS_REQUESTS", "300"))
SEED = int(os.environ.get("CHAOS_SEED", "0"))
KILL_EVERY = 100
NUM_ADAPTERS = 6
NAME = "chaos"
# A pool that holds a part of the adapters and requests, so that they are evicted and preempted.
SPEC = {"pool_bytes": 640 << 10, "host_bytes": 80_000, "max_num_seqs": 8, "max_queued": 24, "sse_heartbeat_s": 0.2}
_MAIN = """
import sys
from pathlib import Path
sys.path.append({root!r})
from tests.serve_apps.chaos import spy
spy.answer_signals(Path({file!r}))
from loray.cli.main import main
main()
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=["serve", pytest.param("up", marks=pytest.mark.cluster)])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("chaos")
    if request.param == "serve":
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
        place = Cluster(cluster, app, NAME)
        wait_until_whole(place)
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
    asyncio.run(undisturbed(place, [Kind("/v1/completions", {"model": "tiny", "prompt": "a"})] * 20))  # all have met
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
    run = Run(place, kinds, asyncio.run(undisturbed(place, kinds)))
    assert eventually(lambda: is_idle(place))
    before, files = most_by_kind(place.held(emptied=False)), place.private_files()

    asyncio.run(run.all(NUM_REQUESTS, KILL_EVERY, SEED))
    wait_until_whole(place)
    totals = status(place.served)["totals"]
    print(dict(run.verdicts), run.kills.num, totals)
    assert not run.wrong, "\n".join(run.wrong[:10])
    assert run.verdicts.total() == NUM_REQUESTS
    if isinstance(place, Cluster):
        assert run.kills.num > 0
    else:  # a replaced replica has no totals
        assert totals["num_evictions"] * totals["num_host_evictions"] > 0

    assert eventually(lambda: is_idle(place), 60)
    assert eventually(lambda: not left(place, before), 60), str(left(place, before))
    assert eventually(lambda: place.private_files() <= files), place.private_files() - files
