"""Data parallelism over torch.distributed, when it is initialised; one process alone otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True)
class World:
    """The ranks that train together, each on its own micro-batches. Every method is a collective call."""

    rank: int = 0
    size: int = 1

    @classmethod
    def current(cls) -> World:
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def sum(self, *values: float, device: torch.device) -> list[float]:
        """Each value summed over ranks, in double precision (exact for counts)."""
        if self.size == 1:
            return list(values)
        packed = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(packed)
        return [float(v) for v in packed]

    def gather(self, value: str | None) -> list[str | None]:
        """Every rank's value, in the order of ranks."""
        if self.size == 1:
            return [value]
        values: list[str | None] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def sum_gradients(self, gradients: Sequence[Tensor]) -> None:
        """In place. The loss is divided by the targets of all ranks beforehand, so the sum is the exact gradient."""
        if self.size == 1:
            return
        pending = [dist.all_reduce(g, async_op=True) for g in gradients]
        for work in pending:
            assert work is not None
            work.wait()
