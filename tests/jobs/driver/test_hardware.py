"""The hardware of a recipe's workers: that of this machine, or of the cluster's nodes with as many GPUs as workers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from jobs.driver import fit
from jobs.workers import worker
from loray.errors import SpecError
from loray.machine import Hardware
from loray.settings import Settings
from tests.fixtures.machines import AVX2, H100
from tests.fixtures.planning import HARDWARE, recipe

SETTINGS = Settings.from_env({})


class Cluster:
    """A Ray whose tasks run here; `found` is what its workers' nodes have."""

    def __init__(self, num_nodes: int, num_gpus: int, found: Hardware) -> None:
        self.num_nodes, self.num_gpus, self.found = num_nodes, num_gpus, found
        self.taken: list[dict[str, Any]] = []

    def is_initialized(self) -> bool:
        return True

    def cluster_resources(self) -> dict[str, float]:
        return {"CPU": 8.0, "GPU": float(self.num_gpus)}

    def nodes(self) -> list[dict[str, Any]]:
        return [{"Alive": True}] * self.num_nodes

    def remote(self, function: Callable[[], Hardware]) -> Any:
        return self

    def options(self, **taken: Any) -> Any:
        self.taken.append(taken)
        return self

    def get(self, reference: Any) -> Hardware:
        return self.found


def look(monkeypatch: pytest.MonkeyPatch, cluster: Cluster, **fields: Any) -> Hardware:
    return workers(monkeypatch, cluster, **fields).hardware


def workers(monkeypatch: pytest.MonkeyPatch, cluster: Cluster, **fields: Any) -> fit.Workers:
    monkeypatch.setattr(fit, "ray", cluster)
    monkeypatch.setattr(cluster, "remote", lambda *_: cluster)
    monkeypatch.setattr(fit, "hardware", lambda: AVX2)

    class Interrupts:
        def arm(self) -> None: ...

    return fit.find_workers(recipe(dtype="auto", **fields), SETTINGS, Interrupts())  # type: ignore[arg-type]


def test_one_node_without_gpus_is_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(1, 0, HARDWARE)
    assert look(monkeypatch, cluster) == AVX2
    assert cluster.taken == []


def test_several_nodes_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster = Cluster(2, 0, HARDWARE)
    assert look(monkeypatch, cluster) == HARDWARE
    assert cluster.taken[0]["num_gpus"] == 0


def test_gpus_are_used_where_there_is_one_for_each_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    node = replace(HARDWARE, gpus=(H100, H100))
    assert look(monkeypatch, Cluster(1, 2, node), num_workers=2).gpus == (H100, H100)
    assert look(monkeypatch, Cluster(1, 2, node), num_workers=4).gpus == ()
    assert look(monkeypatch, Cluster(1, 2, node), num_workers=1, use_gpu=False).gpus == ()
    with pytest.raises(SpecError, match="num_workers is 4, but the cluster has 2 GPUs"):
        look(monkeypatch, Cluster(1, 2, node), num_workers=4, use_gpu=True)


def test_workers_share_a_node_where_they_must(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pod with one GPU has one of them, a machine with eight all; without GPUs they are spread over all nodes."""
    pod, machine = replace(HARDWARE, gpus=(H100,)), replace(HARDWARE, gpus=8 * (H100,))
    assert workers(monkeypatch, Cluster(9, 8, pod), num_workers=8).per_node == 1
    assert workers(monkeypatch, Cluster(1, 8, machine), num_workers=8).per_node == 8
    assert workers(monkeypatch, Cluster(2, 16, machine), num_workers=4).per_node == 4
    assert workers(monkeypatch, Cluster(3, 0, HARDWARE), num_workers=4).per_node == 2
    assert workers(monkeypatch, Cluster(1, 0, HARDWARE), num_workers=4).per_node == 4


@pytest.mark.parametrize(
    ("hardware", "dtype", "warns"), [(AVX2, "bfloat16", True), (AVX2, "float32", False), (HARDWARE, "bfloat16", False)]
)
def test_bfloat16_on_a_cpu_without_it_is_warned_of_with_the_measured_factor(
    monkeypatch: pytest.MonkeyPatch, hardware: Hardware, dtype: str, warns: bool
) -> None:
    rates = {torch.bfloat16: 2e10, torch.float32: 1.2e11}
    monkeypatch.setattr(worker, "hardware", lambda: hardware)
    monkeypatch.setattr("loray.train.rates.product_flops", lambda device, dtype: rates[dtype])
    warning = worker._slow_products(recipe(dtype=dtype), torch.device("cpu"))
    assert (warning is not None) == warns
    assert not warns or "float32 are 6.0 times as fast here" in (warning or "")
