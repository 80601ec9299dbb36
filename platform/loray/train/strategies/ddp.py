"""Data parallel: every rank holds everything."""

from __future__ import annotations

import torch
from torch import nn

from loray.spec import TrainSpec
from loray.train.data.batches import Batch
from loray.train.loss import Objective
from loray.train.mesh import World
from loray.train.optimizer import MasterAdamW, OptimizerState, StepResult
from loray.train.strategies.base import copied, weighted
from loray.train.strategies.buckets import GradientBuckets


class DataParallel:
    """Gradients of micro-batches and ranks are summed in fp32; an fp32 parameter is its own master."""

    def __init__(
        self, objective: Objective, spec: TrainSpec, world: World, device: torch.device, state: OptimizerState | None
    ) -> None:
        self.objective: nn.Module = objective.to(device)
        self._world = world
        self._parameters = objective.trained_parameters()
        self._buckets = GradientBuckets(self._parameters, world)
        masters = {n: p if p.dtype == torch.float32 else p.detach().float() for n, p in self._parameters.items()}
        self._adam = MasterAdamW(masters, spec.optimizer)
        if state is not None:
            self._adam.restore(state, lambda full: full)

    def forward_backward(self, batch: Batch, *, divisor: float, last: bool) -> float:
        if last:
            self._buckets.expect_last()
        loss = self.objective(batch)
        weighted(loss, 1 / divisor).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def step(self, lr: float) -> StepResult:
        norm = self._buckets.reduce()
        result = self._adam.step(self._buckets.gradients, norm, lr)
        self._buckets.clear()
        if not result.skipped:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    if (master := self._adam.masters[name]) is not parameter:
                        parameter.copy_(master)
        return result

    def state(self) -> OptimizerState | None:
        if self._world.rank:
            return None
        state = self._adam.state
        masters, exp_avg, exp_avg_sq = ({n: copied(t) for n, t in tensors.items()} for tensors in state[:3])
        return OptimizerState(masters, exp_avg, exp_avg_sq, state.num_updates)
