"""Elastic training: as many workers as fit, between two bounds, in whole sequence groups.

Ray Train's elastic scaling decides when to resize, and restarts the workers from the last checkpoint. It has no public
setting for the size of a group, so this module overrides two private methods of it. What it knows of nodes may be 20 s
old: workers that it places on a node that was just lost would be waited for until Ray Train's timeout, a minute.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
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


class ElasticTorchTrainer(TorchTrainer):  # type: ignore[misc]
    """Adds and removes workers in groups of `group_size`."""

    def __init__(self, *args: Any, group_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._group_size = group_size

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:  # private: the only way to pass a scaling policy
        policy = WholeGroupScaling(self.scaling_config, self._group_size)
        return super()._initialize_and_run_controller(**kwargs | {"scaling_policy": policy})
