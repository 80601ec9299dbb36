"""The protocol that every strategy keeps, and the loss they share."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from loray.train.data.batches import Batch
from loray.train.optimizer import OptimizerState, StepResult


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
