"""The protocol of all strategies, and the weighted loss that they use."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from loray.train.data.batches import Batch
from loray.train.optimizer import OptimizerState, StepResult


class Strategy(Protocol):
    """Owns the trained parameters and their optimizer. Every method is a collective call.

    A step is `forward_backward` of each micro-batch, then `step`. `objective` may also be called without gradients;
    every rank must call it equally often.
    """

    objective: nn.Module  # Batch → summed loss

    def forward_backward(self, batch: Batch, *, divisor: float, last: bool) -> float:
        """Add the gradient of loss / divisor, summed over ranks, and return this rank's loss.

        `last` marks the last micro-batch of the step. The gradient of a loss that is not finite is not finite.
        """

    def step(self, lr: float) -> StepResult:
        """Clip by the global norm and update. Where the norm is not finite, no rank changes anything."""

    def state(self) -> OptimizerState | None:
        """The full state on rank 0, in copies; None on other ranks."""


def copied(tensor: Tensor) -> Tensor:
    """On the CPU, and another tensor also where it is there already."""
    return tensor.detach().to("cpu", copy=True)


def weighted(loss: Tensor, weight: float) -> Tensor:
    """weight × loss, and nan where the loss is not finite: an infinite loss may have finite gradients."""
    return loss * torch.where(loss.detach().isfinite(), weight, torch.nan)
