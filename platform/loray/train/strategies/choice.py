"""Makes the strategy that a recipe names."""

from __future__ import annotations

import torch

from loray.errors import UnsupportedError
from loray.methods.attach import initial_values
from loray.spec import TrainSpec
from loray.train.mesh import World
from loray.train.model import BaseWeights
from loray.train.objectives import Objective
from loray.train.optimizer import OptimizerState, check_fits
from loray.train.strategies.ddp import DataParallel, Strategy


def prepare(
    objective: Objective,
    spec: TrainSpec,
    world: World,
    device: torch.device,
    weights: BaseWeights,
    state: OptimizerState | None = None,
) -> Strategy:
    """Distribute `objective`, whose model is in this host's memory, over the ranks' devices, and restore a checkpoint's
    `state`, bit for bit. From then on, call the strategy's `objective` instead.

    Parameters on meta are read from `weights`, shard by shard.

    Raises UnsupportedError where the strategy cannot run here, and ValueError where `state` has other parameters.
    """
    parameters = objective.trained_parameters()
    if state is not None:
        check_fits(state, parameters)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state.masters[name])
            for name, value in initial_values(objective.model):
                value.copy_((state.initial or {})[name])
    strategy = spec.parallel.strategy
    if strategy == "ddp":
        return DataParallel(objective, spec, world, device, state)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise UnsupportedError(f"strategy {strategy} needs torch.distributed's process group, which Ray Train sets up")
    if strategy == "fsdp2":
        from loray.train.strategies.fsdp2 import FullyShard  # takes a second, and other strategies do not need it

        return FullyShard(objective, spec, world, device, weights, state)
    from loray.train.strategies.zero import Zero

    return Zero(objective, spec, world, device, weights, state)
