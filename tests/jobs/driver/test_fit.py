"""The hardware of a recipe's workers: that of this machine, or of the cluster's nodes with as many GPUs as workers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.driver import fit
from jobs.driver.fit import check_resources
from loray.errors import SpecError
from loray.machine import Hardware
from loray.settings import Settings
from tests.fixtures.machines import AVX2, H100
from tests.fixtures.planning import HARDWARE, recipe
from tests.fixtures.recipes import write

SETTINGS = Settings.from_env({})


class Cluster:
    """A Ray whose tasks run here; `found` is what its workers' nodes have, `asked` whether one of them was asked."""

    def __init__(self, num_nodes: int, num_gpus: int, found: Hardware) -> None:
        self.num_nodes, self.num_gpus, self.found, self.asked = num_nodes, num_gpus, found, False

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 8.0, "GPU": float(self.num_gpus)}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True}] * self.num_nodes

    def remote(self, *_: Any) -> Any:
        return self

    def options(self, **taken: Any) -> Any:
        self.asked = True
        assert bool(taken["num_gpus"]) == bool(self.num_gpus)
        return self

    def get(self, reference: Any) -> Hardware:
        return self.found


def workers(monkeypatch: pytest.MonkeyPatch, cluster: Cluster, **fields: Any) -> fit.WorkerHardware:
    monkeypatch.setattr(fit, "ray", cluster)
    monkeypatch.setattr(fit, "hardware", lambda: AVX2)
    interrupts: Any = SimpleNamespace(arm=lambda: None)
    return fit.find_workers(recipe(dtype="auto", **fields), SETTINGS, interrupts)


POD, PAIR, EIGHT = (replace(HARDWARE, gpus=n * (H100,)) for n in (1, 2, 8))


@pytest.mark.parametrize(
    ("cluster", "fields", "num_gpus", "per_node"),
    [
        (Cluster(1, 0, AVX2), {"num_workers": 4}, 0, 4),  # this machine, which nobody asks
        (Cluster(2, 0, HARDWARE), {}, 0, 1),
        (Cluster(3, 0, HARDWARE), {"num_workers": 4}, 0, 2),  # spread over all nodes
        (Cluster(1, 2, PAIR), {"num_workers": 2}, 2, 2),
        (Cluster(1, 2, AVX2), {"num_workers": 4}, 0, 4),  # not a GPU for each
        (Cluster(1, 2, AVX2), {"use_gpu": False}, 0, 1),
        (Cluster(9, 8, POD), {"num_workers": 8}, 8, 1),
        (Cluster(1, 8, EIGHT), {"num_workers": 8}, 8, 8),
        (Cluster(2, 16, EIGHT), {"num_workers": 4}, 4, 4),
    ],
)
def test_gpus_are_used_where_there_is_one_for_each_worker_and_workers_share_a_node_where_they_must(
    monkeypatch: pytest.MonkeyPatch, cluster: Cluster, fields: dict[str, Any], num_gpus: int, per_node: int
) -> None:
    made = workers(monkeypatch, cluster, **fields)
    assert (made.hardware, made.per_node) == (replace(cluster.found, gpus=num_gpus * (H100,)), per_node)
    assert cluster.asked == (cluster.found != AVX2)


def test_more_workers_than_gpus_are_refused_where_gpus_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SpecError, match="num_workers is 4, but the cluster has 2 GPUs"):
        workers(monkeypatch, Cluster(1, 2, PAIR), num_workers=4, use_gpu=True)


def test_the_driver_waits_for_what_an_autoscaler_may_add(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, settings = write(tmp_path, num_workers=3), Settings.from_env({})
    in_a_group = Settings.from_env({"LORAY_TRAINING_GROUP": "training"})
    monkeypatch.setattr("ray.cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(fit, "_RAY_UP_CONFIG", tmp_path / "ray_bootstrap_config.yaml")
    monkeypatch.setenv("KUBERAY_GEN_RAY_START_CMD", "ray start --head --num-cpus=0")
    with pytest.raises(SpecError, match="num_workers is 3, but the cluster has 2 CPUs"):
        check_resources(recipe.spec, settings)
    with pytest.raises(SpecError, match="num_workers is 3, but the cluster has 0 of the resource training_worker"):
        check_resources(recipe.spec, in_a_group)
    warned: list[str] = []
    monkeypatch.setattr(fit.log, "warning", lambda text, *args: warned.append(text % args))
    monkeypatch.setenv("KUBERAY_GEN_RAY_START_CMD", "ray start --head --no-monitor --num-cpus=0")
    check_resources(recipe.spec, settings)
    monkeypatch.setenv("KUBERAY_GEN_RAY_START_CMD", "ray start --address=head:6379")  # nobody else adds such nodes
    check_resources(recipe.spec, in_a_group)
    monkeypatch.delenv("KUBERAY_GEN_RAY_START_CMD")
    (tmp_path / "ray_bootstrap_config.yaml").touch()
    check_resources(recipe.spec, settings)
    assert len(warned) == 3
    assert "waiting for its autoscaler" in warned[0]
