"""Pools with the same contents in the same places: rank 0's allocator decides, the other ranks' repeat its answers.

Every rank runs the same code of `Pool` for the same sequence of operations. What an operation does depends only on the
allocator's answers, so only these are sent. KV blocks are not: a step names the blocks that it uses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, assert_never, cast

import torch
from torch import Tensor

from loray.adapters.weights import ProjectionPair
from loray.bases.config import ModelConfig
from loray.engine.memory.blocks import BlockAllocator, Extent, Geometry, Kind
from loray.engine.parallel.channel import (
    AdapterPlace,
    Answer,
    Answers,
    Channel,
    Compact,
    GetPoolMap,
    PlaceAdapter,
    PoolCommand,
    PoolMap,
    RemoveAdapter,
)
from loray.engine.parallel.rows import ShardedAdapter
from loray.engine.parallel.shard import local_device
from loray.engine.pool.packed import PackedAdapter
from loray.engine.pool.pool import Pool, cut_pool
from loray.engine.pool.resident import ResidentAdapter
from loray.spec import AdapterRef, ServeSpec
from loray_kernels import KvLayout, PageWriter

A = TypeVar("A", bound=Answer)


class LeadingAllocator(BlockAllocator):
    """Rank 0's: keeps its answers until they are sent."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._answers: list[Answer] = []

    def allocate_rows(
        self, kind: Kind, demand: Mapping[int, int], *, emptying: int | None = None
    ) -> list[Extent] | None:
        return self._kept(super().allocate_rows(kind, demand, emptying=emptying))

    def allocate_run(self, num_blocks: int) -> int | None:
        return self._kept(super().allocate_run(num_blocks))

    def clear_run(self, num_blocks: int) -> dict[int, int] | None:
        return self._kept(super().clear_run(num_blocks))

    def take_answers(self) -> Answers:
        answers, self._answers = tuple(self._answers), []
        return answers

    def _kept(self, answer: A) -> A:
        self._answers.append(answer)
        return answer


class FollowingAllocator(BlockAllocator):
    """Another rank's: every answer is rank 0's."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.answers: deque[Answer] = deque()

    def allocate_rows(self, *args: Any, **kwargs: Any) -> list[Extent] | None:
        return cast("list[Extent] | None", self.answers.popleft())

    def allocate_run(self, num_blocks: int) -> int | None:
        return cast("int | None", self.answers.popleft())

    def clear_run(self, num_blocks: int) -> dict[int, int] | None:
        return cast("dict[int, int] | None", self.answers.popleft())

    def free_rows(self, extents: Any) -> None:
        pass

    def free_run(self, first: int) -> None:
        pass


class LeadingPool(Pool):
    """Rank 0's."""

    allocator: LeadingAllocator

    def __init__(
        self, spec: ServeSpec, config: ModelConfig, channel: Channel, page_writer: Callable[[Tensor], PageWriter]
    ) -> None:
        (layout, num_blocks), device = _local(spec, config), local_device(spec, 0)
        super().__init__(layout, num_blocks, dtype=getattr(torch, spec.dtype), device=device, page_writer=page_writer)
        self.allocator = LeadingAllocator(self.geometry)
        self._channel = channel

    @property
    def block_bytes(self) -> int:
        """Of all ranks together."""
        return super().block_bytes * self._channel.world_size

    def place(self, ref: AdapterRef, packed: PackedAdapter) -> ResidentAdapter | None:
        assert isinstance(packed, ShardedAdapter)
        known = packed.pair is not None and packed.pair.digest in self.pairs
        resident = super().place(ref, packed)
        answers = self.allocator.take_answers()
        moved = any(isinstance(answer, dict) for answer in answers)  # a run was cleared, though blocks may be short
        if resident is not None or moved:
            parts = (_without_pair(part) if known else part for part in packed.others)
            self._channel.scatter([PlaceAdapter(ref, part, answers) for part in parts])
        return resident

    def remove(self, adapter: ResidentAdapter) -> None:
        super().remove(adapter)
        self._channel.broadcast(RemoveAdapter(adapter.ref.digest))

    def compact(self, num_blocks: int) -> bool:
        freed = super().compact(num_blocks)
        answers = self.allocator.take_answers()
        if freed:
            self._channel.broadcast(Compact(num_blocks, answers))
        return freed

    def check_integrity(self, kv_references: Mapping[int, int], residents: list[ResidentAdapter]) -> None:
        """Also checks that every rank's pool has the same contents."""
        super().check_integrity(kv_references, residents)
        own = pool_map(self)
        for rank, other in enumerate(self._channel.call(GetPoolMap()), 1):
            assert other == own, f"rank {rank}'s pool differs from rank 0's"


class FollowingPool(Pool):
    """Another rank's: executes rank 0's commands."""

    allocator: FollowingAllocator

    def __init__(
        self, spec: ServeSpec, config: ModelConfig, rank: int, page_writer: Callable[[Tensor], PageWriter]
    ) -> None:
        (layout, num_blocks), device = _local(spec, config), local_device(spec, rank)
        super().__init__(layout, num_blocks, dtype=getattr(torch, spec.dtype), device=device, page_writer=page_writer)
        self.allocator = FollowingAllocator(self.geometry)
        self.adapters: dict[str, ResidentAdapter] = {}

    def wait_for(self, adapters: Iterable[ResidentAdapter]) -> None:
        """Rank 0 knows when its own rows have arrived, not when these have."""
        self.wait_for_rows()

    def follow(self, command: PoolCommand) -> None:
        match command:
            case PlaceAdapter(ref, packed, answers):
                self.allocator.answers.extend(answers)
                resident = self.place(ref, packed)
                if resident is not None:
                    self.adapters[ref.digest] = resident
            case RemoveAdapter(digest):
                self.remove(self.adapters.pop(digest))
            case Compact(num_blocks, answers):
                self.allocator.answers.extend(answers)
                self.compact(num_blocks)
            case _:
                assert_never(command)
        assert not self.allocator.answers, "this rank asked its allocator for less than rank 0 did"


def _local(spec: ServeSpec, config: ModelConfig) -> tuple[KvLayout, int]:
    """As many blocks as an engine of one rank would have, each with the KV heads of one of several ranks."""
    layout, num_blocks = cut_pool(spec, config)
    return layout._replace(num_kv_heads=layout.num_kv_heads // spec.tensor_parallel_size), num_blocks


def pool_map(pool: Pool) -> PoolMap:
    """The places of all adapters, which are the same on every rank."""
    return {
        adapter.ref.digest: AdapterPlace(
            adapter.extents,
            adapter.shape,
            None if adapter.pair is None else adapter.pair.first_block,
            adapter.record,
        )
        for adapter in pool.residents
    }


def _without_pair(packed: PackedAdapter) -> PackedAdapter:
    """With an empty pair: the pool has the pair already, and it is as large as many adapters."""
    assert packed.pair is not None
    empty = torch.empty(0)
    return replace(packed, pair=ProjectionPair(empty, empty, packed.pair.digest))
