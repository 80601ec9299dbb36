"""AdamW with fp32 master copies, its parameter groups, learning-rate schedules, and skipped steps.

`loray.train.strategies` distributes parameters and gradients over the ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from loray.methods import keeps_fp32
from loray.spec import OptimizerSpec

MOMENTS = ("exp_avg", "exp_avg_sq")  # as torch.optim.AdamW and DeepSpeed call them


def learning_rate(step: int, num_steps: int, spec: OptimizerSpec) -> float:
    """Compute the rate of step 1 … num_steps: linear warm-up to the full rate, then constant, or decaying to 0."""
    by_ratio = spec.warmup_ratio is not None
    warmup = math.ceil((spec.warmup_ratio or 0) * num_steps) if by_ratio else spec.warmup_steps or 0
    if step <= warmup:
        return spec.learning_rate * step / warmup
    done = (step - 1 - warmup) / max(1, num_steps - warmup)
    match spec.schedule:
        case "constant":
            return spec.learning_rate
        case "linear":
            return spec.learning_rate * (1 - done)
        case "cosine":
            return spec.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


class StepResult(NamedTuple):
    """`grad_norm` is the global L2 norm before clipping. Where it is not finite, the step was skipped."""

    grad_norm: float
    skipped: bool


class OptimizerState(NamedTuple):
    """Full fp32 tensors on the CPU by parameter name: masters of the trained parameters and AdamW's moments.

    It is the same for every strategy and any number of ranks. `num_updates` counts the steps that were not skipped,
    which Adam's bias correction needs. `initial`: what the adapter began with, where that is not trained itself, see
    `methods.attach.initial_values`.
    """

    masters: dict[str, Tensor]
    exp_avg: dict[str, Tensor]
    exp_avg_sq: dict[str, Tensor]
    num_updates: int
    initial: Mapping[str, Tensor] | None = None


def adamw(tensors: Mapping[str, Tensor], spec: OptimizerSpec) -> torch.optim.AdamW:
    """Make AdamW over `tensors`, by parameter name, in groups with the same weight decay and factor `lr_scale`.

    Embeddings, norms and what multiplies outputs have no weight decay. LoRA's B has `loraplus_lr_ratio` times the
    learning rate (LoRA+, Hayou et al., 2024), VeRA's d `vera_d_lr_ratio` times.
    """
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, tensor in tensors.items():
        decay = spec.weight_decay if is_decayed(name) else 0.0
        scale = lr_scale(name, spec)
        groups.setdefault((decay, scale), []).append(tensor)
    return torch.optim.AdamW(
        [{"params": g, "weight_decay": decay, "lr_scale": scale} for (decay, scale), g in groups.items()],
        lr=0.0,  # each step sets it
        betas=(spec.beta1, spec.beta2),
        eps=spec.eps,
    )


def lr_scale(name: str, spec: OptimizerSpec) -> float:
    if ".lora_B." in name:
        return spec.loraplus_lr_ratio or 1.0
    return (spec.vera_d_lr_ratio or 1.0) if name.endswith(".vera_lambda_d") else 1.0


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def start_moments(optimizer: torch.optim.Optimizer, tensors: Iterable[Tensor], num_updates: int) -> None:
    """Initialise AdamW's state with moments of zero, which torch does not do before the first step."""
    for tensor in tensors:
        moments = {key: torch.zeros_like(tensor) for key in MOMENTS}
        optimizer.state[tensor] = {"step": torch.tensor(float(num_updates)), **moments}


def num_updates(optimizer: torch.optim.Optimizer) -> int:
    return int(next(iter(optimizer.state.values()))["step"])


def is_decayed(name: str) -> bool:
    return not (keeps_fp32(name) or any(part in name for part in ("embed", "norm", "lora_magnitude")))


def check_fits(state: OptimizerState, parameters: Mapping[str, nn.Parameter]) -> None:
    """Raise ValueError where the parameters of `state` have other names or full shapes."""
    if {n: p.shape for n, p in parameters.items()} != {n: m.shape for n, m in state.masters.items()}:
        raise ValueError("the checkpoint trains other parameters than this recipe; start afresh, without --resume")


class MasterAdamW:
    """AdamW over fp32 copies of the trained parameters (Micikevicius et al., 2018), or of this rank's shards of them.

    A bf16 weight of size 1 cannot change by less than 0.004: without masters, small updates are lost. The caller copies
    `masters` back into the model's parameters.
    """

    def __init__(self, masters: Mapping[str, Tensor], spec: OptimizerSpec) -> None:
        self.masters = dict(masters)
        self._spec = spec
        self._adam = adamw(self.masters, spec)
        start_moments(self._adam, self.masters.values(), 0)

    def step(self, gradients: Mapping[str, Tensor], norm: float, lr: float) -> StepResult:
        """Clip `gradients` in place and update; change nothing where `norm`, over all ranks, is not finite."""
        if not math.isfinite(norm):
            return StepResult(norm, skipped=True)
        if self._spec.max_grad_norm is not None and norm > self._spec.max_grad_norm:
            torch._foreach_mul_(list(gradients.values()), self._spec.max_grad_norm / norm)
        for name, master in self.masters.items():
            master.grad = gradients[name]
        set_learning_rate(self._adam, lr)
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        return StepResult(norm, skipped=False)

    @property
    def state(self) -> OptimizerState:
        """The state that this rank holds. The tensors are those in use, not copies."""
        exp_avg, exp_avg_sq = ({n: self._adam.state[m][key] for n, m in self.masters.items()} for key in MOMENTS)
        return OptimizerState(self.masters, exp_avg, exp_avg_sq, num_updates(self._adam))

    @torch.no_grad()
    def restore(self, state: OptimizerState, part: Callable[[Tensor], Tensor]) -> None:
        """Copy `state`. `part` returns this rank's part of a full tensor."""
        start_moments(self._adam, self.masters.values(), state.num_updates)
        for ours, full in zip(self.state[:3], state[:3], strict=True):
            for name, tensor in ours.items():
                tensor.copy_(part(full[name]))
