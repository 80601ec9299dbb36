"""Elastic training: as many workers as fit, between two bounds, in whole sequence groups.

Ray Train's elastic scaling decides when to resize, and restarts the workers from the last checkpoint. It has no public
setting for the size of a group, so this module overrides a private method of it. What it knows of nodes may be 20 s
old: workers that it places on a node that was just lost would be waited for until Ray Train's timeout, a minute.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy


class WholeGroupScaling(ElasticScalingPolicy):  # type: ignore[misc]
    """Ray Train's elastic policy, with numbers of workers that are multiples of `group_size`, on nodes that live."""

    def __init__(self, scaling_config: ScalingConfig, group_size: int) -> None:
        super().__init__(scaling_config)
        self._group_size = group_size

    def _count_possible_workers(self, reserved_resources: Any) -> int:  # private: Ray has no public hook for the number
        live = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        reserved = {node: resources for node, resources in reserved_resources.items() if node in live}
        possible: int = super()._count_possible_workers(reserved)
        return possible - possible % self._group_size
