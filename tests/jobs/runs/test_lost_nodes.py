"""An elastic run with sequence groups on two nodes, one of which is lost with a whole group."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from loray.adapters.peft_format import WEIGHTS_FILE
from loray.bases.registry import BaseModel, add_base
from loray.catalog import Catalog
from loray.settings import Settings
from loray.store import AdapterStore, open_store
from tests.fixtures.cluster import RayCluster
from tests.fixtures.nodes import Node
from tests.fixtures.recipes import write
from tests.fixtures.runs import run, train_here
from tests.fixtures.tiny import write_checkpoint

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(480)]

TINY = "tiny-elastic"
GROUP = "elastic"  # of nodes, on which nothing else runs
STEPS = 200
FIELDS: dict[str, Any] = {
    "base": TINY,
    "dtype": "float32",
    "max_steps": STEPS,
    "evaluation": {"interval_steps": 10},
    "optimizer": {"learning_rate": 1e-3},
}


@pytest.fixture(scope="module")
def base(ray_cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    checkpoint = write_checkpoint(tmp_path_factory.mktemp("checkpoint"), std=0.05)
    return add_base(str(checkpoint), home=ray_cluster.home, name=TINY)


@contextmanager
def nodes(cluster: RayCluster, count: int, num_workers: int, folder: Path) -> Iterator[list[Node]]:
    """Nodes of GROUP, each with places for so many workers."""
    import ray

    started: list[Node] = []
    env = cluster.settings.to_env() | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    try:
        for number in range(1, count + 1):  # one after the other: two at once take each other's ports
            resources = {f"{GROUP}_worker": float(num_workers)}
            started.append(Node(cluster.local, folder / f"node-{number}.log", env, resources=resources))
            deadline = time.monotonic() + 90
            while ray.cluster_resources().get(f"{GROUP}_worker", 0) < number * num_workers:
                assert time.monotonic() < deadline, started[-1].log_file.read_text(encoding="utf-8")
                started[-1].keep()
                time.sleep(0.2)
        yield started
    finally:
        for node in started:
            node.kill()


def test_the_groups_that_are_left_go_on(ray_cluster: RayCluster, base: BaseModel, tmp_path: Path) -> None:
    """Of two groups of two workers one is lost with its node. The other takes the steps that one worker alone takes."""
    alone = train_here(
        write(tmp_path / "alone", name="alone", **FIELDS, batch={"rows": 2, "accumulation": 2}),
        ray_cluster.settings,
        tmp_path,
    )
    settings = Settings.from_env(ray_cluster.settings.to_env() | {"LORAY_TRAINING_GROUP": GROUP})
    recipe = write(
        tmp_path / "fewer",
        name="fewer",
        **FIELDS,
        batch={"rows": 2, "accumulation": 1},
        num_workers=4,
        min_workers=2,
        parallel={"sequence": 2},
    )
    lost: list[Node] = []
    with nodes(ray_cluster, 2, 2, tmp_path) as started:

        def lose_the_node_of_rank_0(event: dict[str, Any], seen: list[dict[str, Any]]) -> None:
            if event["event"] == "checkpoint" and not lost:
                rank_0 = psutil.Process(next(e["pid"] for e in seen if e["event"] == "start"))
                above = {process.pid for process in rank_0.parents()}
                lost.extend(node for node in started if node.pid in above)
                lost[0].kill()

        events = run(recipe, settings, lose_the_node_of_rank_0)

    assert len(lost) == 1
    first, second = (e for e in events if e["event"] == "start")
    assert (first["step"], first["num_workers"], second["num_workers"]) == (0, 4, 2)
    assert second["step"] >= 10
    assert [e["event"] for e in events].count("worker_lost") == 1
    ours, theirs = _steps(events), _steps(alone)
    assert list(ours) == list(theirs) == list(range(1, STEPS + 1))
    for name in ("num_tokens", "epoch", "lr"):  # no row is left out or taken twice
        assert [e[name] for e in ours.values()] == [e[name] for e in theirs.values()]
    assert [e["loss"] for e in ours.values()] == pytest.approx([e["loss"] for e in theirs.values()], rel=1e-3)
    store, tensors = AdapterStore(open_store(settings.store)), []
    for name in ("fewer", "alone"):
        assert list(Catalog(settings.catalog).adapters.get(name).versions) == [1]
        version = Catalog(settings.catalog).adapters.version(name, 1)
        store.fetch(version.digest, tmp_path / name / "adapter")
        tensors.append(load_file(tmp_path / name / "adapter" / WEIGHTS_FILE))
    torch.testing.assert_close(*tensors, rtol=1e-3, atol=1e-3)


def _steps(events: list[dict[str, Any]]) -> dict[int, dict[str, Any]]:
    """By number; of a step that was repeated the last one."""
    return {e["step"]: e for e in events if e["event"] == "step"}
