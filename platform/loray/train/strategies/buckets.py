"""fp32 sums of gradients in flat buckets. A bucket is all-reduced as soon as the last backward pass has filled it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loray.planning.memory import GRADIENT_BUCKET_BYTES
from loray.spec import DTYPE_BYTES
from loray.train.mesh import World

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
        """The next backward pass is the last one of this step: buckets that it fills may be reduced."""
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
