"""ZeRO-2 and ZeRO-3 (Rajbhandari et al., 2020) by DeepSpeed, an optional dependency.

DeepSpeed gets one group of all ranks. Sequence groups are torch's: with a sequence × data mesh in DeepSpeed, ranks
diverge silently. DeepSpeed averages gradients over ranks, so losses are scaled to get the sum. Optimizer states are
read and set as full fp32 tensors, with DeepSpeed's functions for that.
"""

from __future__ import annotations

import importlib.util
import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from loray.errors import UnsupportedError
from loray.spec import TrainSpec
from loray.train.data.batches import TrainBatch
from loray.train.mesh import World
from loray.train.model import BaseWeights, replace_parameters
from loray.train.objectives import Objective
from loray.train.optimizer import (
    MOMENTS,
    OptimizerState,
    StepResult,
    adamw,
    num_updates,
    set_learning_rate,
    start_moments,
)
from loray.train.strategies.ddp import BUCKET_ELEMENTS, copied, weighted

_PERSISTENT_ELEMENTS = 100_000  # ZeRO-3 keeps smaller parameters gathered: DeepSpeed's own default


class Zero:
    """DeepSpeed's engine as a strategy, in stage 2 or 3."""

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
        self._stage = 2 if spec.parallel.strategy == "zero2" else 3
        self._deepspeed = _import_deepspeed(device)
        config = _config(spec, self._stage)
        self._parameters: dict[str, Any] = dict(objective.trained_parameters())
        if self._stage == 3:
            self._shard(objective, config, weights)
            head = objective.model.get_output_embeddings()
            self._deepspeed.zero.register_external_parameter(objective, head.weight)  # the loss reads it
            for module in objective.modules():
                for parameter in getattr(module, "reads", ()):
                    self._deepspeed.zero.register_external_parameter(module, parameter)
        self._adam = adamw(self._parameters, spec.optimizer)
        dtypes = {name: buffer.dtype for name, buffer in objective.named_buffers()}
        self._engine, *_ = self._deepspeed.initialize(
            model=objective, optimizer=self._adam, config=config, dist_init_required=False
        )
        _check_buffers(objective, dtypes)
        self.objective: nn.Module = self._engine
        self._start_moments(0 if state is None else state.num_updates)
        if state is not None:
            self._restore(state)

    def _shard(self, objective: Objective, config: dict[str, Any], weights: BaseWeights) -> None:
        """Shard parameter by parameter. Rank 0 reads each frozen one, and DeepSpeed sends it to the others."""

        def read(name: str, parameter: nn.Parameter) -> Tensor | None:
            if not parameter.is_meta:
                return None
            return weights.read(name).clone() if self._world.rank == 0 else torch.empty_like(parameter, device="cpu")

        def shard(module: nn.Module) -> None:
            self._deepspeed.zero.Init(module=module, config_dict_or_path=config)

        replace_parameters(objective.model, read, then=lambda parameter: shard(nn.ParameterList([parameter])))
        shard(objective)  # what is trained

    def forward_backward(self, batch: TrainBatch, *, totals: Mapping[str, float], last: bool) -> float:
        self._engine.set_gradient_accumulation_boundary(last)
        loss: Tensor = self._engine(batch, totals)
        self._engine.backward(weighted(loss, self._world.size), scale_wrt_gas=False)
        return float(loss.detach())

    def step(self, lr: float) -> StepResult:
        set_learning_rate(self._adam, lr)
        self._engine.step()
        return StepResult(float(self._engine.get_global_grad_norm()), skipped=bool(self._engine.optimizer.overflow))

    def state(self) -> OptimizerState | None:
        sets: list[dict[str, Tensor]] = []
        for key in (None, *MOMENTS):
            sets.append({})
            for name, p in self._parameters.items():
                full = self._full(p, key)
                if self._world.rank == 0:
                    sets[-1][name] = copied(full)
        return None if self._world.rank else OptimizerState(sets[0], sets[1], sets[2], num_updates(self._adam))

    def _full(self, parameter: Any, key: str | None) -> Tensor:
        utils = self._deepspeed.utils
        full: Tensor
        if key is None:
            full = utils.safe_get_full_fp32_param(parameter)
        else:
            full = utils.safe_get_full_optimizer_state(parameter, key)
        return full

    def _start_moments(self, done: int) -> None:
        """Initialise the moments, which DeepSpeed does at the first step only, in one flat tensor per group."""
        zero = self._engine.optimizer
        flat = zero.single_partition_of_fp32_groups if self._stage == 2 else zero.fp32_partitioned_groups_flat
        start_moments(self._adam, flat, done)
        if self._stage == 2:
            zero._lazy_init_hp_params_optimizer_state()

    def _restore(self, state: OptimizerState) -> None:
        """Restore masters and moments. The model's parameters are restored already."""
        utils = self._deepspeed.utils
        for name, p in self._parameters.items():
            if self._stage == 2:
                utils.safe_set_full_fp32_param(p, state.masters[name].to(p.device))
                for key in MOMENTS:
                    utils.safe_set_full_optimizer_state(p, getattr(state, key)[name].to(p.device), key)
            else:
                utils.safe_set_local_fp32_param(p, self._part(state.masters[name], p))
                for key in MOMENTS:
                    utils.safe_set_local_optimizer_state(p, self._part(getattr(state, key)[name], p), key)

    def _part(self, full: Tensor, parameter: Any) -> Tensor:
        """This rank's part of a flat parameter, which ZeRO-3 pads to equal parts."""
        numel = parameter.ds_tensor.numel()
        start = min(self._world.rank * numel, full.numel())
        part = full.flatten()[start : start + numel].to(parameter.device)
        return nn.functional.pad(part, (0, numel - part.numel()))


def _config(spec: TrainSpec, stage: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": BUCKET_ELEMENTS}
    if stage == 3:
        zero["stage3_param_persistence_threshold"] = _PERSISTENT_ELEMENTS
    return {
        "train_micro_batch_size_per_gpu": 1,  # not used: losses are divided by the number of targets
        "gradient_accumulation_steps": 1,  # `forward_backward` marks the last micro-batch
        "gradient_clipping": spec.optimizer.max_grad_norm or 0.0,
        "zero_optimization": zero,
        "bf16": {"enabled": spec.chosen_dtype == "bfloat16", "check_grad_overflow": True},  # else nan is applied
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
    }


def _check_buffers(objective: nn.Module, dtypes: Mapping[str, torch.dtype]) -> None:
    """Raise UnsupportedError where a buffer is no longer of its dtype: RoPE's frequencies in bf16 are wrong from some
    ten thousand positions on.
    """
    changed = [name for name, buffer in objective.named_buffers() if buffer.dtype != dtypes[name]]
    if changed:
        raise UnsupportedError(
            f"this DeepSpeed changes the dtype of {changed[0]}: pip install --upgrade 'loray[deepspeed]', or take fsdp2"
        )


def check_installed() -> None:
    """Raise UnsupportedError where DeepSpeed is missing."""
    if importlib.util.find_spec("deepspeed") is None:
        raise UnsupportedError(
            "strategies zero2 and zero3 need DeepSpeed: pip install 'loray[deepspeed]', or take fsdp2"
        )


def _import_deepspeed(device: torch.device) -> Any:
    check_installed()
    os.environ.setdefault("DS_ACCELERATOR", device.type)  # DeepSpeed prefers a GPU, which this run may not use
    deepspeed = importlib.import_module("deepspeed")
    if device.type == "cpu":  # DeepSpeed would compile this collective, which is for inference, for a minute
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    return deepspeed
