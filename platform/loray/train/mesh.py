"""The ranks of a run over torch.distributed, data × sequence. Without torch.distributed there is one rank.

S neighbouring ranks form a sequence group: they read the same micro-batch, and each computes its part of the rows. Rank
r is sequence rank r mod S of data rank r div S. All strategies use torch's process groups.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from loray.errors import SpecError
from loray.train.data.batches import TrainBatch
from loray.train.sequence import SequenceGroup, sequence_parallel, shard


@dataclass(frozen=True, slots=True)
class World:
    """All ranks that train together, those of `process_group`. Every method is a collective call."""

    rank: int = 0
    size: int = 1
    process_group: dist.ProcessGroup | None = None  # None: all ranks of torch.distributed

    @classmethod
    def current(cls) -> World:
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def sum(self, *values: float, device: torch.device) -> list[float]:
        """Sum each value over ranks, in double precision (exact for counts)."""
        if self.size == 1:
            return list(values)
        packed = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(packed, group=self.process_group)
        found: list[float] = packed.tolist()
        return found

    def share_out(self, function: Callable[[int], int], num: int, *, device: torch.device) -> list[int]:
        """Compute a function of 0 to num − 1, each on one rank."""
        mine = [float(function(k)) if k % self.size == self.rank else 0.0 for k in range(num)]
        return [int(value) for value in self.sum(*mine, device=device)]

    def gather(self, value: str | None) -> list[str | None]:
        """Collect the values of all ranks, in their order."""
        if self.size == 1:
            return [value]
        values: list[str | None] = [None] * self.size
        dist.all_gather_object(values, value, group=self.process_group)
        return values


@dataclass(frozen=True, slots=True)
class Mesh:
    """`world`, and this rank's sequence group in it."""

    world: World
    sequence: SequenceGroup

    @classmethod
    def build(cls, sequence_size: int, device: torch.device) -> Mesh:
        """Build the mesh on all ranks together. Raises SpecError where the sequence groups do not cover the world."""
        world = World.current()
        if world.size % sequence_size:
            raise SpecError(f"{world.size} workers do not split into sequence groups of {sequence_size}")
        if sequence_size == 1:
            return cls(world, SequenceGroup())
        shape = (world.size // sequence_size, sequence_size)
        device_mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "sequence"))
        return cls(world, SequenceGroup.of(device_mesh.get_group("sequence")))

    @classmethod
    def of_group(cls, group: SequenceGroup) -> Mesh:
        """Take one sequence group as the whole world: other groups train something else."""
        return cls(World(group.rank, group.size, group.process_group), group)

    @property
    def data_rank(self) -> int:
        return self.world.rank // self.sequence.size

    @property
    def data_size(self) -> int:
        return self.world.size // self.sequence.size

    @contextmanager
    def part(self, batch: TrainBatch) -> Iterator[TrainBatch]:
        """Take this rank's part of its group's micro-batch. Inside the block models attend to whole rows."""
        if self.sequence.size == 1:
            yield batch
            return
        sharded = shard(batch, self.sequence)
        with sequence_parallel(sharded):
            yield sharded.local


ALONE = Mesh(World(), SequenceGroup())  # one rank, with or without others beside it
