"""Placement of workers: what each takes of its node, and whole sequence groups on nodes.

A group exchanges keys and values in every layer, and so does not span nodes.

Ray Train numbers its workers node by node (within a node by GPU), and neighbouring ranks form a sequence group. A group
lies on one node if every node runs a multiple of the group's size. Ray itself packs workers on few nodes, with any
number on each. So each worker is bound to a node before it starts, by what is free then; a worker that replaces a lost
one is bound again.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from ray._private.state import available_resources_per_node, state  # private: public APIs give the cluster's sum only
from ray.train.v2._internal.execution.callback import WorkerGroupCallback  # private: runs before workers start

from loray.spec import TrainingGroup, TrainSpec
from loray.telemetry import get_logger

log = get_logger(__name__)

_NODE_ID = "ray.io/node-id"  # a label of every node
_SETTLE_S = 5.0  # within which the resources of workers that have ended become free


def worker_resources(spec: TrainSpec, group: TrainingGroup | None) -> dict[str, float]:
    """Returns what one worker takes of its node, beside memory. `group` None: it may be any node."""
    return ({"CPU": 1.0} if group is None else group.worker) | ({"GPU": 1.0} if spec.use_gpu is True else {})


def place(room: Mapping[str, int], num_workers: int, group_size: int) -> list[str] | None:
    """Returns the node of every worker, group by group: each group on one node, on as few nodes as possible.

    `room` maps each node to the number of workers that fit on it. None if the groups do not fit.
    """
    nodes: list[str] = []
    for node, places in sorted(room.items(), key=lambda item: (-item[1], item[0])):
        whole = places - places % group_size
        nodes += [node] * min(whole, num_workers - len(nodes))
    return nodes if len(nodes) == num_workers else None


def straddling(nodes: Sequence[str | None], group_size: int) -> list[int]:
    """Returns the groups that span more than one node, if rank r runs on nodes[r]."""
    starts = range(0, len(nodes), group_size)
    return [group for group, start in enumerate(starts) if len(set(nodes[start : start + group_size])) > 1]


def straddling_warning(nodes: Sequence[str | None], group_size: int) -> str | None:
    groups = straddling(nodes, group_size)
    if not groups:
        return None
    return (
        f"{len(groups)} of {len(nodes) // group_size} sequence groups span several nodes, and exchange keys and values "
        f"over the network in every layer: no set of nodes had place for whole groups of {group_size} workers. Free "
        "places, or lower parallel.sequence"
    )


def leaving_nodes() -> set[str]:
    """Returns the nodes whose end was announced, on which nothing new starts."""
    return set(state.get_draining_nodes())


class WholeGroups(WorkerGroupCallback):  # type: ignore[misc]
    """Binds workers to nodes before they start, in Ray Train's controller. Groups that do not fit are packed by Ray."""

    def __init__(self, group_size: int) -> None:
        self._group_size = group_size

    @staticmethod
    def label_selectors(num_workers: int) -> list[dict[str, str]]:
        """Returns, for the ScalingConfig, an empty selector per worker, which `before_worker_group_start` fills in."""
        return [{} for _ in range(num_workers)]

    def before_worker_group_start(self, worker_group_context: Any) -> None:
        needs: dict[str, float] = worker_group_context.resources_per_worker
        deadline = time.monotonic() + _SETTLE_S
        while True:
            leaving = leaving_nodes()
            available = {node: free for node, free in available_resources_per_node().items() if node not in leaving}
            room = {node: _places(free, needs) for node, free in available.items()}
            nodes = place(room, worker_group_context.num_workers, self._group_size)
            if nodes is not None or time.monotonic() > deadline:
                break
            time.sleep(0.1)
        if nodes is None:
            log.warning("no set of nodes has place for whole sequence groups of %d workers now", self._group_size)
            return
        # An elastic run with fewer workers may still have the selectors of the most.
        for selector, node in zip(worker_group_context.label_selector[: len(nodes)], nodes, strict=True):
            selector[_NODE_ID] = node


def _places(free: Mapping[str, float], needs: Mapping[str, float]) -> int:
    return min(int(free.get(resource, 0.0) / amount) for resource, amount in needs.items() if amount)
