"""Sequence groups on nodes: on one node each if they fit, and a warning if not."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.worker_group.worker import ActorMetadata, Worker
from ray.train.v2._internal.execution.worker_group.worker_group import WorkerGroup

from jobs import controller
from jobs.controller import WholeGroupScaling
from jobs.workers import placement
from jobs.workers.placement import WholeGroups, place, straddling, straddling_warning


def ranks(nodes: list[str]) -> list[str]:
    """The node of each world rank, as Ray Train numbers workers on these nodes."""
    workers = [
        Worker(None, ActorMetadata(hostname=node, node_id=node, node_ip=node, pid=i, accelerator_ids={}), {}, i)
        for i, node in enumerate(nodes)
    ]
    return [w.metadata.node_id for w in WorkerGroup._assign_worker_ranks(workers)]


@given(
    places=st.lists(st.integers(0, 9), min_size=1, max_size=8),
    group_size=st.sampled_from([1, 2, 3, 4]),
    num_groups=st.integers(1, 6),
)
def test_groups_are_whole_wherever_they_fit(places: list[int], group_size: int, num_groups: int) -> None:
    room = {f"node{i}": n for i, n in enumerate(places)}
    nodes = place(room, num_groups * group_size, group_size)
    assert (nodes is None) == (sum(n // group_size for n in places) < num_groups)
    if nodes is None:
        return
    assert len(nodes) == num_groups * group_size
    assert all(count <= room[node] for node, count in Counter(nodes).items())
    assert straddling(nodes, group_size) == []
    assert straddling(ranks(nodes), group_size) == []  # in the order in which Ray numbers them, too


def test_few_nodes_are_used() -> None:
    assert place({"a": 2, "b": 8, "c": 4}, 8, 2) == ["b"] * 8
    assert place({"a": 2, "b": 5, "c": 4}, 6, 2) == ["b"] * 4 + ["c"] * 2
    assert place({"a": 3, "b": 3}, 6, 2) is None
    assert place({"a": 3, "b": 3}, 4, 2) == ["a", "a", "b", "b"]


@pytest.fixture(autouse=True)
def leaving(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Nodes whose end was announced."""
    found = set[str]()
    for module in (placement, controller):
        monkeypatch.setattr(module, "leaving_nodes", lambda: found)
    return found


def test_nothing_is_placed_where_nodes_will_be_taken_away(monkeypatch: pytest.MonkeyPatch, leaving: set[str]) -> None:
    leaving.add("a")
    monkeypatch.setattr(placement, "available_resources_per_node", lambda: {"a": {"CPU": 4.0}, "b": {"CPU": 2.0}})
    with_nodes(monkeypatch, a=True, b=True)
    config = ScalingConfig(num_workers=(2, 4), label_selector=WholeGroups.label_selectors(4))
    assert WholeGroupScaling(config, 2)._count_possible_workers({"a": {"CPU": 4.0}, "b": {"CPU": 2.0}}) == 2
    context: Any = SimpleNamespace(
        num_workers=2, resources_per_worker={"CPU": 1}, label_selector=WholeGroups.label_selectors(2)
    )
    WholeGroups(2).before_worker_group_start(context)
    assert [s["ray.io/node-id"] for s in context.label_selector] == ["b", "b"]


def test_straddling_groups_are_reported() -> None:
    assert straddling(["a", "a", "a", "b", "b", "b"], 2) == [1]
    assert straddling(["a", "b"], 1) == []
    assert straddling_warning(["a", "a", "b", "b"], 2) is None
    warning = straddling_warning(["a", "a", "a", "b"], 2) or ""
    assert "1 of 2 sequence groups span several nodes" in warning
    assert "lower parallel.sequence" in warning


def test_workers_are_bound_by_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the resources of the workers before them have become free."""
    free = iter([{"a": {"CPU": 1.0}}, {"a": {"CPU": 3.5, "GPU": 3.0}, "b": {"CPU": 9.0, "GPU": 2.0}, "head": {}}])
    monkeypatch.setattr(placement, "available_resources_per_node", lambda: next(free))
    context: Any = SimpleNamespace(
        num_workers=4, resources_per_worker={"CPU": 1, "GPU": 1}, label_selector=WholeGroups.label_selectors(4)
    )
    WholeGroups(2).before_worker_group_start(context)
    assert [s["ray.io/node-id"] for s in context.label_selector] == ["a", "a", "b", "b"]


def with_nodes(monkeypatch: pytest.MonkeyPatch, **alive: bool) -> None:
    found = [{"NodeID": name, "Alive": is_alive} for name, is_alive in alive.items()]
    monkeypatch.setattr(controller.ray, "nodes", lambda: found)


@pytest.mark.parametrize("is_cut", [True, False])
def test_an_elastic_run_that_lost_a_group_starts_with_the_others(monkeypatch: pytest.MonkeyPatch, is_cut: bool) -> None:
    """Of at most two groups of two workers one is left. Ray cuts the list of selectors to the workers, or does not."""
    monkeypatch.setattr(placement, "available_resources_per_node", lambda: {"a": {"CPU": 1.0}, "b": {"CPU": 3.0}})
    with_nodes(monkeypatch, a=True, b=True)
    config = ScalingConfig(num_workers=(2, 4), label_selector=WholeGroups.label_selectors(4))
    assert WholeGroupScaling(config, 2)._count_possible_workers({"a": {"CPU": 1.0}, "b": {"CPU": 2.0}}) == 2
    selectors = config._label_selector_per_worker(2 if is_cut else 4)
    context: Any = SimpleNamespace(num_workers=2, resources_per_worker={"CPU": 1}, label_selector=selectors)
    WholeGroups(2).before_worker_group_start(context)
    assert selectors == [{"ray.io/node-id": "b"}] * 2 + [{}] * (0 if is_cut else 2)


def test_where_whole_groups_do_not_fit_ray_packs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "available_resources_per_node", lambda: {"a": {"CPU": 3}, "b": {"CPU": 1}})
    monkeypatch.setattr(placement, "_SETTLE_S", 0)
    context: Any = SimpleNamespace(
        num_workers=4, resources_per_worker={"CPU": 1}, label_selector=WholeGroups.label_selectors(4)
    )
    WholeGroups(2).before_worker_group_start(context)
    assert context.label_selector == [{}] * 4


def test_elastic_runs_have_whole_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    with_nodes(monkeypatch, a=True, b=True)
    policy = WholeGroupScaling(ScalingConfig(num_workers=(2, 6)), group_size=2)
    counts = [policy._count_possible_workers({"a": {"CPU": float(n)}, "b": {"CPU": 1.0}}) for n in range(8)]
    assert counts == [0, 2, 2, 4, 4, 6, 6, 6]


def test_a_node_that_was_just_lost_has_no_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's coordinator still counts its resources."""
    policy = WholeGroupScaling(ScalingConfig(num_workers=(2, 6)), group_size=2)
    reserved = {"a": {"CPU": 3.0}, "b": {"CPU": 3.0}}
    with_nodes(monkeypatch, a=True, b=True)
    assert policy._count_possible_workers(reserved) == 6
    with_nodes(monkeypatch, a=True, b=False)
    assert policy._count_possible_workers(reserved) == 2
