"""The pools of ranks, which have the same contents, and the commands that rank 0 sends to the others.

Every rank runs the same code of `Pool` for the same sequence of operations. What an operation does depends only on the
allocator's answers, so only these are sent. KV blocks are not: a step names the blocks that it uses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar, assert_never, cast

import torch
from torch import Tensor

from loray.bases.config import ModelConfig
from loray.engine.memory.adapter_layout import AdapterShape, LayerGroup, Matrix
from loray.engine.memory.blocks import BlockAllocator, BlockKind, Extent, Geometry
from loray.engine.parallel.communicator import Communicator
from loray.engine.parallel.shard import ShardedAdapter, local_device
from loray.engine.parallel.transport import Codec, Encoded
from loray.engine.pool.packed import PackedAdapter
from loray.engine.pool.pool import AdapterDescriptor, Pool, ResidentAdapter, cut_pool
from loray.errors import RankLost
from loray.methods.weights import SharedProjection
from loray.spec import AdapterRef, RopeParameters, ServeSpec
from loray_kernels import CaptureLimits, KvLayout, PageWriter, Parts

# Results of allocate_rows, allocate_run and clear_run of the allocator, in the order of the calls.
RankAnswer = list[Extent] | int | dict[int, int] | None
Answers = tuple[RankAnswer, ...]


class Forward(NamedTuple):
    """A step, see `communicator`. It is the last command of a message, as Replay is: the ranks compute it together."""

    chunks: bytes
    digests: tuple[str, ...]


class Replay(NamedTuple):
    """A captured decode step, see `communicator`."""

    step: bytes


class PlaceAdapter(NamedTuple):
    ref: AdapterRef
    packed: PackedAdapter
    answers: Answers


class RemoveAdapter(NamedTuple):
    digest: str


class GetPoolMap(NamedTuple):
    """The answer is the PoolMap of the rank's pool."""


class UseCaptures(NamedTuple):
    num_slots: int
    max_blocks: int


class CompileAdapters(NamedTuple):
    pass


class CaptureSteps(NamedTuple):
    limits: CaptureLimits


PoolCommand = PlaceAdapter | RemoveAdapter
ModelCommand = Forward | Replay | UseCaptures | CompileAdapters | CaptureSteps
Command = PoolCommand | ModelCommand | GetPoolMap


class AdapterPlace(NamedTuple):
    """The places of an adapter and its descriptor. `first_pair_block` None: it has no VeRA pair."""

    extents: tuple[Extent, ...]
    shape: AdapterShape
    first_pair_block: int | None
    descriptor: AdapterDescriptor | None


PoolMap = dict[str, AdapterPlace]  # by digest

# The classes of all commands and answers, and of what they consist of.
CODEC = Codec(
    (
        Forward,
        Replay,
        PlaceAdapter,
        RemoveAdapter,
        GetPoolMap,
        UseCaptures,
        CompileAdapters,
        CaptureSteps,
        CaptureLimits,
        AdapterRef,
        PackedAdapter,
        AdapterShape,
        LayerGroup,
        Matrix,
        SharedProjection,
        RopeParameters,
        AdapterPlace,
        Extent,
        BlockKind,
        AdapterDescriptor,
        Parts,
    )
)


class Channel:
    """Rank 0's end. The other ranks execute commands in the order of these calls."""

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self.world_size = communicator.shard.world_size
        self._waiting: list[list[Encoded]] = [[] for _ in range(1, self.world_size)]

    def broadcast(self, command: Command) -> None:
        """Collect a command that is the same for all ranks."""
        packed = CODEC.dumps(command)
        for waiting in self._waiting:
            waiting.append(packed)

    def scatter(self, commands: Sequence[Command]) -> None:
        """Collect a command each for ranks 1, 2 … Their tensors are rows of adapters, which stay in host memory."""
        for waiting, command in zip(self._waiting, commands, strict=True):
            waiting.append(CODEC.dumps(command, rows_apart=True))

    def flush(self) -> None:
        """Send the collected commands. RankLost if a rank has ended."""
        for rank, waiting in enumerate(self._waiting, 1):
            try:
                self._communicator.send(CODEC.dumps([packed.data for packed in waiting]).data, rank)
                for rows in (rows for packed in waiting for rows in packed.rows):
                    self._communicator.send_rows(rows, rank)
            except RuntimeError as e:
                raise RankLost(f"rank {rank} of the engine is gone: {e}") from e
            waiting.clear()

    def call(self, command: GetPoolMap) -> list[PoolMap]:
        """Send `command` and return the answers of ranks 1, 2 …"""
        self.broadcast(command)
        self.flush()
        return [CODEC.loads(self._communicator.receive(rank)) for rank in range(1, self.world_size)]


A = TypeVar("A", bound=RankAnswer)


class LeadingAllocator(BlockAllocator):
    """Rank 0's allocator, which keeps its answers until they are sent."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self._answers: list[RankAnswer] = []

    def allocate_rows(self, kind: BlockKind, demand: Mapping[int, int]) -> list[Extent] | None:
        return self._noted(super().allocate_rows(kind, demand))

    def allocate_run(self, num_blocks: int) -> int | None:
        return self._noted(super().allocate_run(num_blocks))

    def clear_run(self, num_blocks: int) -> dict[int, int] | None:
        return self._noted(super().clear_run(num_blocks))

    def take_answers(self) -> Answers:
        answers, self._answers = tuple(self._answers), []
        return answers

    def _noted(self, answer: A) -> A:
        self._answers.append(answer)
        return answer


class FollowingAllocator(BlockAllocator):
    """Another rank's allocator, every answer of which is rank 0's."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry)
        self.answers: deque[RankAnswer] = deque()

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
    """Rank 0's pool, whose changes the other ranks follow."""

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
        """The bytes of a block on all ranks together."""
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

    def check_integrity(self, kv_references: Mapping[int, int], residents: list[ResidentAdapter]) -> None:
        """Check this pool, and that every rank's has the same contents."""
        super().check_integrity(kv_references, residents)
        own = pool_map(self)
        for rank, other in enumerate(self._channel.call(GetPoolMap()), 1):
            assert other == own, f"rank {rank}'s pool differs from rank 0's"


class FollowingPool(Pool):
    """Another rank's pool, which executes rank 0's commands."""

    allocator: FollowingAllocator

    def __init__(
        self, spec: ServeSpec, config: ModelConfig, rank: int, page_writer: Callable[[Tensor], PageWriter]
    ) -> None:
        (layout, num_blocks), device = _local(spec, config), local_device(spec, rank)
        super().__init__(layout, num_blocks, dtype=getattr(torch, spec.dtype), device=device, page_writer=page_writer)
        self.allocator = FollowingAllocator(self.geometry)
        self.adapters: dict[str, ResidentAdapter] = {}

    def wait_for(self, adapters: Iterable[ResidentAdapter]) -> None:
        """Wait for all: rank 0 knows when its own rows have arrived, not when these have."""
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
            case _:
                assert_never(command)
        assert not self.allocator.answers, "this rank asked its allocator for less than rank 0 did"


def _local(spec: ServeSpec, config: ModelConfig) -> tuple[KvLayout, int]:
    """Cut as many blocks as an engine of one rank would have, each with the KV heads of one of several ranks."""
    layout, num_blocks = cut_pool(spec, config)
    return layout._replace(num_kv_heads=layout.num_kv_heads // spec.tensor_parallel_size), num_blocks


def pool_map(pool: Pool) -> PoolMap:
    """List the places of all adapters, which are the same on every rank."""
    return {
        adapter.ref.digest: AdapterPlace(
            adapter.extents,
            adapter.shape,
            None if adapter.pair is None else adapter.pair.first_block,
            adapter.descriptor,
        )
        for adapter in pool.residents
    }


def _without_pair(packed: PackedAdapter) -> PackedAdapter:
    """Empty the pair: the pool has the pair already, and it is as large as many adapters."""
    assert packed.pair is not None
    empty = torch.empty(0)
    return replace(packed, pair=SharedProjection(empty, empty, packed.pair.digest))
