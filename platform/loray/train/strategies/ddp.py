"""Data parallelism: every rank holds everything. The protocol of all strategies stands here, too."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loray.planning.memory import GRADIENT_BUCKET_BYTES
from loray.spec import DTYPE_BYTES, TrainSpec
from loray.train.data.batches import TrainBatch
from loray.train.mesh import World
from loray.train.objectives import Objective
from loray.train.optimizer import MasterAdamW, OptimizerState, StepResult


class Strategy(Protocol):
    """Owns the trained parameters and their optimizer. Every method is a collective call.

    A step is `forward_backward` of each micro-batch, then `step`. `objective` may also be called without gradients;
    every rank must call it equally often.
    """

    objective: nn.Module  # (TrainBatch, totals) → its part of the mean loss

    def forward_backward(self, batch: TrainBatch, *, totals: Mapping[str, float], last: bool) -> float:
        """Add the gradient of this micro-batch's part of the mean loss, summed over ranks, and return the part.

        `totals` are the objective's counts over the whole step. `last` marks the last micro-batch of the step. The
        gradient of a loss that is not finite is not finite.
        """

    def step(self, lr: float) -> StepResult:
        """Clip by the global norm and update. Where the norm is not finite, no rank changes anything."""

    def state(self) -> OptimizerState | None:
        """The full state on rank 0, in copies; None on other ranks."""


def copied(tensor: Tensor) -> Tensor:
    """Copy a tensor to the CPU, also where it is there already."""
    return tensor.detach().to("cpu", copy=True)


def weighted(loss: Tensor, weight: float) -> Tensor:
    """Compute weight × loss, and nan where the loss is not finite: an infinite loss may have finite gradients."""
    return loss * torch.where(loss.detach().isfinite(), weight, torch.nan)


BUCKET_ELEMENTS = GRADIENT_BUCKET_BYTES // DTYPE_BYTES["float32"]


class GradientBuckets:
    """Adds every gradient of `parameters` in fp32 as the backward pass computes it, and frees it.

    Buckets hold the parameters from the last to the first, the usual order of the backward pass. All ranks reduce them
    in that order, also where gradients arrive in another.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], world: World) -> None:
        self._world = world
        self.gradients: dict[str, Tensor] = {}
        self._flat: list[Tensor] = []
        self._sizes: list[int] = []  # parameters of each bucket
        self._is_last = False
        for names in _split(parameters):
            numel = sum(parameters[name].numel() for name in names)
            flat = torch.zeros(numel, dtype=torch.float32, device=parameters[names[0]].device)
            start = 0
            for name in names:
                parameter = parameters[name]
                self.gradients[name] = flat[start : start + parameter.numel()].view_as(parameter)
                start += parameter.numel()
                hook = partial(self._collect, name, len(self._flat))
                parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]
            self._flat.append(flat)
            self._sizes.append(len(names))
        self._missing = list(self._sizes)
        self._pending: list[Any] = []

    def expect_last(self) -> None:
        """Allow the next backward pass, the last one of this step, to reduce the buckets that it fills."""
        self._is_last = True

    def reduce(self) -> float:
        """Wait for the sums over ranks, and return their global L2 norm."""
        while len(self._pending) < len(self._flat):  # parameters without a gradient on this rank
            self._launch()
        for work in self._pending:
            if work is not None:
                work.wait()
        return float(torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(flat) for flat in self._flat])))

    def clear(self) -> None:
        for flat in self._flat:
            flat.zero_()
        self._missing = list(self._sizes)
        self._pending = []
        self._is_last = False

    def _collect(self, name: str, bucket: int, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self.gradients[name].add_(parameter.grad)
        parameter.grad = None
        if self._is_last:
            self._missing[bucket] -= 1
            while len(self._pending) < len(self._flat) and self._missing[len(self._pending)] == 0:
                self._launch()

    def _launch(self) -> None:
        flat = self._flat[len(self._pending)]
        self._pending.append(dist.all_reduce(flat, async_op=True) if self._world.size > 1 else None)


def _split(parameters: Mapping[str, nn.Parameter]) -> list[list[str]]:
    buckets: list[list[str]] = []
    room = 0
    for name in reversed(list(parameters)):
        numel = parameters[name].numel()
        if not buckets or numel > room:
            buckets.append([])
            room = BUCKET_ELEMENTS
        buckets[-1].append(name)
        room -= numel
    return buckets


class DataParallel:
    """Sums gradients of micro-batches and ranks in fp32; an fp32 parameter is its own master."""

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

    def forward_backward(self, batch: TrainBatch, *, totals: Mapping[str, float], last: bool) -> float:
        if last:
            self._buckets.expect_last()
        loss = self.objective(batch, totals)
        weighted(loss, 1.0).backward()  # type: ignore[no-untyped-call]
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
