"""AdamW of many adapters: each is clipped, skipped and updated by itself, as where it trains alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from loray.spec import OptimizerSpec
from loray.train.many.bank import AdapterBank
from loray.train.many.stacks import Bucket, Memory
from loray.train.optimizer import StepResult, is_decayed, lr_scale


class Update(NamedTuple):
    """One step of an adapter at this learning rate. `spec` has its betas, decay, clip and ratios."""

    name: str
    learning_rate: float
    spec: OptimizerSpec


class _Scalars(NamedTuple):
    """What AdamW multiplies with; adapters with equal ones are updated together."""

    decay: float
    beta1: float
    beta2: float
    root2: float  # of 1 − beta2^t
    eps: float
    step_size: float


@torch.no_grad()
def update(bank: AdapterBank, updates: Sequence[Update]) -> dict[str, StepResult]:
    """Step each adapter by the gradients it has, and set these to zero.

    Where the norm of an adapter's gradients is not finite, it alone is skipped. Equal gradients give the bits of
    torch.optim.AdamW.
    """
    norms = bank.gradient_norms([u.name for u in updates])
    results: dict[str, StepResult] = {}
    steps: dict[Bucket, dict[int, Update]] = {}
    for u in updates:
        norm = norms[u.name]
        results[u.name] = StepResult(norm, skipped=not math.isfinite(norm))
        if results[u.name].skipped:
            continue
        bucket, slot = bank.place(u.name)
        steps.setdefault(bucket, {})[slot] = u
        limit = u.spec.max_grad_norm
        if limit is not None and norm > limit:
            bucket.memory.gradient[slot].mul_(limit / norm)
    for bucket, own in steps.items():
        for parameters in bucket.parameters:
            scalars = {slot: _scalars(u, bank.num_updates(u.name) + 1, parameters.example) for slot, u in own.items()}
            for slots, alike in _runs(scalars):
                _step(bucket.memory, slots, parameters.numbers, alike)
    bank.updated([u.name for u in updates if not results[u.name].skipped])
    bank.zero_gradients([u.name for u in updates])
    return results


def _scalars(u: Update, step: int, example: str) -> _Scalars:
    """Compute the factors of AdamW's step (1, 2, …) of the parameters called like `example`, as torch does."""
    spec, lr = u.spec, u.learning_rate * lr_scale(example, u.spec)
    decay = spec.weight_decay if is_decayed(example) else 0.0
    corrections = 1 - spec.beta1**step, 1 - spec.beta2**step
    return _Scalars(1 - lr * decay, spec.beta1, spec.beta2, corrections[1] ** 0.5, spec.eps, lr / corrections[0])


def _runs(scalars: dict[int, _Scalars]) -> Iterator[tuple[slice, _Scalars]]:
    """Yield neighbouring slots with equal scalars."""
    slots = sorted(scalars)
    first = 0
    for i, slot in enumerate(slots):
        following = slots[i + 1] if i + 1 < len(slots) else None
        if following != slot + 1 or scalars[following] != scalars[slot]:
            yield slice(slots[first], slot + 1), scalars[slot]
            first = i + 1


def _step(memory: Memory, slots: slice, numbers: slice, by: _Scalars) -> None:
    """The operations of torch.optim.AdamW on one tensor, in its order, so that their bits are equal."""

    def of(tensor: Tensor) -> Tensor:
        return tensor[slots, numbers]

    master, grad, exp_avg, exp_avg_sq = map(of, (memory.master, memory.gradient, memory.exp_avg, memory.exp_avg_sq))
    if by.decay != 1:
        master.mul_(by.decay)
    exp_avg.lerp_(grad, 1 - by.beta1)
    exp_avg_sq.mul_(by.beta2).addcmul_(grad, grad, value=1 - by.beta2)
    denominator = (exp_avg_sq.sqrt() / by.root2).add_(by.eps)
    master.addcdiv_(exp_avg, denominator, value=-by.step_size)
