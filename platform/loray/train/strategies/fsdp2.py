"""FSDP2: torch's `fully_shard` over all ranks, one group per decoder layer and one for the rest.

fully_shard needs one dtype in a group, so that trained parameters have the base's dtype. The optimizer of each rank
keeps fp32 masters of the rank's shards. Gradients are accumulated and reduced in fp32, and rounded to the parameters'
dtype once per step, in their shards. Frozen parameters are on meta when they are sharded; then every rank reads its
rows of them.

Shapes: a parameter is split along its first dimension as `Tensor.chunk` does; the last ranks may hold nothing of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from loray.spec import TrainSpec
from loray.train.data.batches import TrainBatch
from loray.train.mesh import World
from loray.train.model import BaseWeights, replace_parameters
from loray.train.objectives import Objective
from loray.train.optimizer import MasterAdamW, OptimizerState, StepResult
from loray.train.strategies.ddp import copied, weighted


def shard(module: Any, world: World, device: torch.device, weights: BaseWeights) -> Any:
    """Shard `module`, which has a causal language model as `model`, over all ranks, each layer by itself.

    Parameters on meta are read from `weights`.
    """
    mesh = init_device_mesh(device.type, (world.size,))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for layer in module.model.base_model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    sharded = fully_shard(module, mesh=mesh, mp_policy=policy)
    replace_parameters(module.model, lambda name, p: _read_shard(name, p, world, device, weights))
    return sharded


def _read_shard(name: str, parameter: Any, world: World, device: torch.device, weights: BaseWeights) -> Tensor | None:
    """This rank's rows of a parameter that has none yet."""
    if parameter.device.type != "meta":
        return None
    rows = torch.empty_like(parameter.to_local(), device=device)
    if len(rows):
        start = world.rank * -(-len(parameter) // world.size)
        rows.copy_(weights.read_rows(name, start, start + len(rows)))
    spread = parameter.device_mesh, parameter.placements
    return DTensor.from_local(rows, *spread, shape=parameter.shape, stride=parameter.stride())


class FullyShard:
    """`fully_shard` as a strategy."""

    def __init__(
        self,
        objective: Objective,
        spec: TrainSpec,
        world: World,
        device: torch.device,
        weights: BaseWeights,
        state: OptimizerState | None,
    ) -> None:
        self._world = world
        self.objective: Any = shard(objective, world, device, weights)
        self._parameters: dict[str, Any] = dict(objective.trained_parameters())
        masters = {name: _shard(p).float().clone() for name, p in self._parameters.items()}
        self._adam = MasterAdamW(masters, spec.optimizer)
        if state is not None:
            self._adam.restore(state, self._part)

    def forward_backward(self, batch: TrainBatch, *, totals: Mapping[str, float], last: bool) -> float:
        self.objective.set_requires_gradient_sync(last)
        loss = self.objective(batch, totals)
        # fully_shard takes the mean over ranks.
        weighted(loss, self._world.size).backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def step(self, lr: float) -> StepResult:
        gradients = {name: self._take_gradient(p) for name, p in self._parameters.items()}
        squares = torch.stack([g.double().square().sum() for g in gradients.values()]).sum()
        dist.all_reduce(squares)
        result = self._adam.step(gradients, float(squares.sqrt()), lr)
        if not result.skipped:
            for name, master in self._adam.masters.items():
                _shard(self._parameters[name]).copy_(master)
        return result

    def state(self) -> OptimizerState | None:
        state = self._adam.state
        masters, exp_avg, exp_avg_sq = (self._gather(shards) for shards in state[:3])
        return None if self._world.rank else OptimizerState(masters, exp_avg, exp_avg_sq, state.num_updates)

    def _gather(self, shards: dict[str, Tensor]) -> dict[str, Tensor]:
        full: dict[str, Tensor] = {}
        for name, shard in shards.items():
            p = self._parameters[name]
            spread = DTensor.from_local(shard, p.device_mesh, p.placements, shape=p.shape, stride=p.stride())
            tensor = spread.full_tensor()
            if self._world.rank == 0:
                full[name] = copied(tensor)
        return full

    def _part(self, full: Tensor) -> Tensor:
        parts = full.chunk(self._world.size)
        return parts[self._world.rank] if self._world.rank < len(parts) else full[:0]

    @staticmethod
    def _take_gradient(parameter: Any) -> Tensor:
        gradient, parameter.grad = parameter.grad, None
        shard = _shard(parameter)
        return torch.zeros_like(shard, dtype=torch.float32) if gradient is None else gradient.to_local().float()


def _shard(parameter: Any) -> Tensor:
    """This rank's shard, a view of the parameter."""
    shard: Tensor = parameter.detach().to_local()
    return shard
