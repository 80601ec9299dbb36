"""Pools that hold the same in the same places: rank 0's allocator decides, the other ranks' repeat its answers.

Every rank runs the same code of `Pool` for the same sequence of operations. What an operation does depends on the
allocator's answers alone, so they are all that has to travel. KV blocks need not: a step names those that it uses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar, assert_never

import torch
from torch import Tensor

from loray.adapters.weights import ProjectionPair
from loray.bases.config import ModelConfig
from loray.engine.memory.blocks import BlockAllocator, Extent, Geometry, Kind
from loray.engine.parallel.channel import Answers, AskMap, Channel, Compact, PlaceAdapter, RemoveAdapter
from loray.engine.parallel.rows import ShardedAdapter
from loray.engine.parallel.shard import local_device
from loray.engine.pool.packed import PackedAdapter
from loray.engine.pool.pool import Pool, cut_pool
from loray.engine.pool.resident import ResidentAdapter, ResidentPair
from loray.spec import AdapterRef, ServeSpec
from loray_kernels import KvLayout, PageWriter

T = TypeVar("T")


class LeadingAllocator(BlockAllocator):
    """Rank 0's: keeps what it answers to operations of the pool until that is sent."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._answers: list[Any] = []

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

    def _kept(self, answer: T) -> T:
        self._answers.append(answer)
        return answer


class FollowingAllocator(BlockAllocator):
    """The other ranks': every answer is rank 0's."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.answers: deque[Any] = deque()

    def allocate_rows(self, *args: Any, **kwargs: Any) -> list[Extent] | None:
        answer: list[Extent] | None = self.answers.popleft()
        return answer

    def allocate_run(self, num_blocks: int) -> int | None:
        answer: int | None = self.answers.popleft()
        return answer

    def clear_run(self, num_blocks: int) -> dict[int, int] | None:
        answer: dict[int, int] | None = self.answers.popleft()
        return answer

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
        """On all ranks together."""
        return super().block_bytes * self._channel.world_size

    def place(self, ref: AdapterRef, packed: PackedAdapter) -> ResidentAdapter | None:
        assert isinstance(packed, ShardedAdapter)
        known = packed.pair is not None and packed.pair.digest in self._pairs
        resident = super().place(ref, packed)
        answers = self.allocator.take_answers()
        moved = any(isinstance(answer, dict) for answer in answers)  # a run was cleared, even if that did not suffice
        if resident is not None or moved:
            parts = (_without_numbers(part) if known else part for part in packed.others)
            self._channel.tell_each([PlaceAdapter(ref, part, answers) for part in parts])
        return resident

    def remove(self, adapter: ResidentAdapter) -> None:
        super().remove(adapter)
        self._channel.tell(RemoveAdapter(adapter.ref.digest))

    def compact(self, num_blocks: int) -> bool:
        freed = super().compact(num_blocks)
        answers = self.allocator.take_answers()
        if freed:
            self._channel.tell(Compact(num_blocks, answers))
        return freed

    def check_integrity(self, kv_references: Mapping[int, int], residents: list[ResidentAdapter]) -> None:
        """Of every rank's pool."""
        super().check_integrity(kv_references, residents)
        own = pool_map(self)
        for rank, other in enumerate(self._channel.ask(AskMap()), 1):
            assert other == own, f"rank {rank}'s pool differs from rank 0's"


class FollowingPool(Pool):
    """Of every other rank."""

    allocator: FollowingAllocator

    def __init__(
        self, spec: ServeSpec, config: ModelConfig, rank: int, page_writer: Callable[[Tensor], PageWriter]
    ) -> None:
        (layout, num_blocks), device = _local(spec, config), local_device(spec, rank)
        super().__init__(layout, num_blocks, dtype=getattr(torch, spec.dtype), device=device, page_writer=page_writer)
        self.allocator = FollowingAllocator(self.geometry)
        self.adapters: dict[str, ResidentAdapter] = {}

    def pair(self, digest: str) -> ResidentPair:
        return self._pairs[digest]

    def follow(self, command: PlaceAdapter | RemoveAdapter | Compact) -> None:
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
    """As many blocks as one rank would have, each with the KV heads of one of several."""
    layout, num_blocks = cut_pool(spec, config)
    return layout._replace(num_kv_heads=layout.num_kv_heads // spec.tensor_parallel_size), num_blocks


def pool_map(pool: Pool) -> dict[str, Any]:
    """Where everything but KV is: equal on every rank."""
    return {
        adapter.ref.digest: (adapter.extents, adapter.shape, adapter.pair and adapter.pair.first_block)
        for adapter in pool.residents
    }


def _without_numbers(packed: PackedAdapter) -> PackedAdapter:
    """With an empty pair: it is in the pool already, and is as large as many adapters."""
    assert packed.pair is not None
    empty = torch.empty(0)
    return replace(packed, pair=ProjectionPair(empty, empty, packed.pair.digest))
