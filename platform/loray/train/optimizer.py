"""AdamW with fp32 master copies, learning-rate schedules, clipping, and steps that are skipped when not finite."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from loray.spec import OptimizerSpec
from loray.train.data_parallel import World


def learning_rate(step: int, num_steps: int, spec: OptimizerSpec) -> float:
    """Of step 1 … num_steps. Linear warm-up to the full rate, then constant, or falling to 0 after the last."""
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
    """`grad_norm` is the global L2 norm before clipping; where it or the loss is not finite, nothing was changed."""

    grad_norm: float
    skipped: bool


class MasterAdamW:
    """AdamW over fp32 copies of the trained parameters (Micikevicius et al., 2018); fp32 parameters are their own copy.

    A bf16 weight of size 1 does not move by less than 0.004: without masters, small steps vanish. Gradients of
    micro-batches are summed in fp32 for the same reason. Use: backward, `collect`, …, `step`.
    Owns the masters and moments; `parameters` stay the model's.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], spec: OptimizerSpec, world: World) -> None:
        self._spec, self._world = spec, world
        self._parameters = dict(parameters)
        self._masters = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float())
            for name, p in self._parameters.items()
        }
        decayed = [m for name, m in self._masters.items() if is_decayed(name)]
        rest = [m for name, m in self._masters.items() if not is_decayed(name)]
        groups = [{"params": decayed, "weight_decay": spec.weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self._adam = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=spec.learning_rate,
            betas=(spec.beta1, spec.beta2),
            eps=spec.eps,
        )

    def collect(self) -> None:
        """Move the gradients of one backward pass into the fp32 sums."""
        for name, parameter in self._parameters.items():
            master = self._masters[name]
            if parameter is master or parameter.grad is None:
                continue
            grad = parameter.grad.float()
            master.grad = grad if master.grad is None else master.grad.add_(grad)
            parameter.grad = None

    def step(self, lr: float, *, loss_is_finite: bool) -> StepResult:
        """Sum gradients over ranks, clip, update, copy back. Every rank takes the same decision."""
        for master in self._masters.values():
            if master.grad is None:  # a rank without a target: it takes part in the sum all the same
                master.grad = torch.zeros_like(master)
        grads = [m.grad for m in self._masters.values() if m.grad is not None]
        self._world.sum_gradients(grads)
        norm = float(nn.utils.get_total_norm(grads))
        if not (loss_is_finite and math.isfinite(norm)):
            self._clear()
            return StepResult(norm, skipped=True)
        if self._spec.max_grad_norm is not None and norm > self._spec.max_grad_norm:
            for grad in grads:
                grad.mul_(self._spec.max_grad_norm / norm)
        for group in self._adam.param_groups:
            group["lr"] = lr
        self._adam.step()
        self._copy_back()
        self._clear()
        return StepResult(norm, skipped=False)

    def state_dict(self) -> dict[str, Any]:
        """Masters by name and the moments: with the base, all that the trained model is."""
        return {"masters": {n: m.detach() for n, m in self._masters.items()}, "adam": self._adam.state_dict()}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the model's parameters too, bit for bit. Raises ValueError where names or shapes differ."""
        saved: dict[str, Tensor] = state["masters"]
        if {n: m.shape for n, m in self._masters.items()} != {n: m.shape for n, m in saved.items()}:
            raise ValueError("the checkpoint trains other parameters than this recipe; start afresh, without --resume")
        for name, master in self._masters.items():
            master.copy_(saved[name])
        self._adam.load_state_dict(state["adam"])
        self._copy_back()

    @torch.no_grad()
    def _copy_back(self) -> None:
        for name, parameter in self._parameters.items():
            if parameter is not self._masters[name]:
                parameter.copy_(self._masters[name])

    def _clear(self) -> None:
        for name, parameter in self._parameters.items():
            parameter.grad = None
            self._masters[name].grad = None


def is_decayed(name: str) -> bool:
    return "embed" not in name and "norm" not in name
