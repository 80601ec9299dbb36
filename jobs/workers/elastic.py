"""Training with as many workers as there is place for, between two numbers of them: Ray Train's elastic scaling, in
whole sequence groups.

Ray Train has no public setting for that, so its policy is refined here. Its own decides when to look again, and the
workers start anew from the last checkpoint with what it finds.
"""

from __future__ import annotations

from typing import Any

from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import ElasticScalingPolicy


class WholeGroupScaling(ElasticScalingPolicy):  # type: ignore[misc]
    def __init__(self, scaling_config: ScalingConfig, group_size: int) -> None:
        super().__init__(scaling_config)
        self._group_size = group_size

    def _count_possible_workers(self, reserved_resources: Any) -> int:
        possible: int = super()._count_possible_workers(reserved_resources)
        return possible - possible % self._group_size


class ElasticTorchTrainer(TorchTrainer):  # type: ignore[misc]
    """`group_size` workers come and go together."""

    def __init__(self, *args: Any, group_size: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._group_size = group_size

    def _initialize_and_run_controller(self, **kwargs: Any) -> Any:
        policy = WholeGroupScaling(self.scaling_config, self._group_size)
        return super()._initialize_and_run_controller(**kwargs | {"scaling_policy": policy})
