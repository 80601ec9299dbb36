"""AdamW of many adapters: each is clipped, skipped and updated by itself, as where it trains alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch

from loray.spec import OptimizerSpec
from loray.train.many.bank import AdapterBank
from loray.train.many.stacks import Bucket, Memory
from loray.train.optimizer import StepResult, is_decayed, lr_scale

T = TypeVar("T")
_BLOCK = 1 << 17


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
                for block in _blocks(slots, parameters.numbers):
                    _step(bucket.memory, *block, alike)
        for slots, _ in _runs(dict.fromkeys(own)):
            bucket.refresh(slots)
        for u in own.values():
            bank.count_update(u.name)
    bank.zero_gradients([name for name, result in results.items() if result.skipped])
    return results


def _scalars(u: Update, step: int, example: str) -> _Scalars:
    """Compute the factors of AdamW's step (1, 2, …) of the parameters called like `example`, as torch does."""
    spec, lr = u.spec, u.learning_rate * lr_scale(example, u.spec)
    decay = spec.weight_decay if is_decayed(example) else 0.0
    corrections = 1 - spec.beta1**step, 1 - spec.beta2**step
    return _Scalars(1 - lr * decay, spec.beta1, spec.beta2, corrections[1] ** 0.5, spec.eps, lr / corrections[0])


def _runs(values: Mapping[int, T]) -> Iterator[tuple[slice, T]]:
    """Yield neighbouring slots with equal values."""
    slots = sorted(values)
    first = 0
    for i, slot in enumerate(slots):
        following = slots[i + 1] if i + 1 < len(slots) else None
        if following != slot + 1 or values[following] != values[slot]:
            yield slice(slots[first], slot + 1), values[slot]
            first = i + 1


def _blocks(slots: slice, numbers: slice) -> Iterator[tuple[slice, slice]]:
    """Cut into parts of at most `_BLOCK` numbers, which a CPU's cache holds."""
    width = min(_BLOCK, numbers.stop - numbers.start)
    height = _BLOCK // width
    for row in range(slots.start, slots.stop, height):
        for column in range(numbers.start, numbers.stop, width):
            yield slice(row, min(row + height, slots.stop)), slice(column, min(column + width, numbers.stop))


def _step(memory: Memory, slots: slice, numbers: slice, by: _Scalars) -> None:
    """Do what torch.optim.AdamW does with one tensor, in its order, so that bits are equal; then zero the gradient."""
    tensors = (memory.master, memory.gradient, memory.exp_avg, memory.exp_avg_sq)
    master, grad, exp_avg, exp_avg_sq = (tensor[slots, numbers] for tensor in tensors)
    if by.decay != 1:
        master.mul_(by.decay)
    exp_avg.lerp_(grad, 1 - by.beta1)
    exp_avg_sq.mul_(by.beta2).addcmul_(grad, grad, value=1 - by.beta2)
    denominator = exp_avg_sq.sqrt().div_(by.root2).add_(by.eps)
    master.addcdiv_(exp_avg, denominator, value=-by.step_size)
    grad.zero_()
