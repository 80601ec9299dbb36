"""The protocol, and the choice."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from loray.errors import UnsupportedError
from loray.spec import TrainSpec
from loray.train.data.batches import Batch
from loray.train.loss import Objective
from loray.train.mesh import World
from loray.train.optimizer import OptimizerState, StepResult, check_fits


class Strategy(Protocol):
    """Owns the trained parameters and their optimizer. Every method is a collective call.

    A step is `forward_backward` of each micro-batch, then `step`. `objective` computes what training does, without
    gradients too: every rank must call it equally often.
    """

    objective: nn.Module  # Batch → summed loss

    def forward_backward(self, batch: Batch, *, divisor: float, last: bool) -> float:
        """Add the gradient of loss / divisor, summed over ranks; returns the rank's loss. `last`: of the step.

        A loss that is not finite makes the gradient so.
        """

    def step(self, lr: float) -> StepResult:
        """Clip by the global norm and update. Where that is not finite no rank changes anything."""

    def state(self) -> OptimizerState | None:
        """Gathered on rank 0; None on the others."""


def weighted(loss: Tensor, weight: float) -> Tensor:
    """weight × loss, but nan where the loss is not finite: an infinite one may have sound gradients."""
    return loss * torch.where(loss.detach().isfinite(), weight, torch.nan)


def prepare(
    objective: Objective, spec: TrainSpec, world: World, device: torch.device, state: OptimizerState | None = None
) -> Strategy:
    """Put `objective`, whose model `build_model` made in this host's memory, on the ranks' devices; from then on it is
    the strategy's to call. A checkpoint's `state` is restored, bit for bit.

    Raises UnsupportedError where the strategy cannot run here, ValueError where `state` is of other parameters.
    """
    parameters = objective.trained_parameters()
    if state is not None:
        check_fits(state, parameters)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(state.masters[name])
    strategy = spec.parallel.strategy
    if strategy == "ddp":
        from loray.train.strategies.ddp import DataParallel

        return DataParallel(objective, spec, world, device, state)
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise UnsupportedError(f"strategy {strategy} needs torch.distributed's process group, which Ray Train sets up")
    if strategy == "fsdp2":
        from loray.train.strategies.fsdp2 import FullyShard

        return FullyShard(objective, spec, world, device, state)
    from loray.train.strategies.zero import Zero

    return Zero(objective, spec, world, device, state)
