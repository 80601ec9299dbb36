"""fp32 sums of gradients in flat buckets, each all-reduced as soon as the last backward pass has filled it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from loray.train.mesh import World

BUCKET_ELEMENTS = 25 * (1 << 20) // 4  # 25 MiB, as torch's DDP has it


class GradientBuckets:
    """Takes every gradient of `parameters` away as the backward pass makes it, and adds it in fp32.

    Buckets are filled from the last parameter to the first, the order in which gradients come, and are reduced in
    that order on all ranks, whatever the order in which they come on each.
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
        """The next backward pass is the last one of this step: what it fills may be reduced."""
        self._is_last = True

    def reduce(self) -> float:
        """Wait for the sums over ranks; returns their global L2 norm."""
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
