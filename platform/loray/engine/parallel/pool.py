"""The pools of ranks, which have the same contents, and the commands that rank 0 sends to the others.

Rank 0's allocator decides. The others are sent what it gave for an adapter, and which blocks it moved. KV blocks are
not sent: a step names the blocks that it uses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, assert_never

import torch
from torch import Tensor

from loray.bases.config import ModelConfig
from loray.engine.memory.adapter_layout import AdapterShape, LayerGroup, Matrix
from loray.engine.memory.blocks import BlockKind, Extent
from loray.engine.parallel.communicator import Communicator
from loray.engine.parallel.shard import ShardedAdapter, local_device
from loray.engine.parallel.transport import Codec, Encoded
from loray.engine.pool.packed import PackedAdapter
from loray.engine.pool.pool import AdapterDescriptor, Allocation, Pool, ResidentAdapter, cut_pool
from loray.errors import RankLost
from loray.methods.weights import SharedProjection
from loray.spec import AdapterRef, RopeParameters, ServeSpec
from loray_kernels import CaptureLimits, PageWriter, Parts


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
    allocation: Allocation


class MoveBlocks(NamedTuple):
    moves: dict[int, int]


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


PoolCommand = PlaceAdapter | MoveBlocks | RemoveAdapter
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
        Allocation,
        MoveBlocks,
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


class _RankPool(Pool):
    """This pool has as many blocks as that of an engine of one rank, each with the KV heads of one of several ranks."""

    def __init__(
        self, spec: ServeSpec, config: ModelConfig, rank: int, page_writer: Callable[[Tensor], PageWriter]
    ) -> None:
        (layout, num_blocks), device = cut_pool(spec, config), local_device(spec, rank)
        layout = layout._replace(num_kv_heads=layout.num_kv_heads // spec.tensor_parallel_size)
        super().__init__(layout, num_blocks, dtype=getattr(torch, spec.dtype), device=device, page_writer=page_writer)


class LeadingPool(_RankPool):
    """Rank 0's pool, whose changes the other ranks follow."""

    def __init__(
        self, spec: ServeSpec, config: ModelConfig, channel: Channel, page_writer: Callable[[Tensor], PageWriter]
    ) -> None:
        super().__init__(spec, config, 0, page_writer)
        self._channel = channel

    @property
    def block_bytes(self) -> int:
        """The bytes of a block on all ranks together."""
        return super().block_bytes * self._channel.world_size

    def fill(self, ref: AdapterRef, packed: PackedAdapter, allocation: Allocation) -> ResidentAdapter:
        assert isinstance(packed, ShardedAdapter)
        resident = super().fill(ref, packed, allocation)
        is_known = packed.pair is not None and allocation.pair_block is None
        parts = [_without_pair(part) if is_known else part for part in packed.others]
        self._channel.scatter([PlaceAdapter(ref, part, allocation) for part in parts])
        return resident

    def move(self, moves: Mapping[int, int]) -> None:
        super().move(moves)
        self._channel.broadcast(MoveBlocks(dict(moves)))

    def remove(self, adapter: ResidentAdapter) -> None:
        super().remove(adapter)
        self._channel.broadcast(RemoveAdapter(adapter.ref.digest))

    def check_integrity(self, kv_references: Mapping[int, int], residents: list[ResidentAdapter]) -> None:
        """Check this pool, and that every rank's has the same contents."""
        super().check_integrity(kv_references, residents)
        own = pool_map(self)
        for rank, other in enumerate(self._channel.call(GetPoolMap()), 1):
            assert other == own, f"rank {rank}'s pool differs from rank 0's"


class FollowingPool(_RankPool):
    """Another rank's pool, which executes rank 0's commands. Its own allocator is not asked."""

    def __init__(
        self, spec: ServeSpec, config: ModelConfig, rank: int, page_writer: Callable[[Tensor], PageWriter]
    ) -> None:
        super().__init__(spec, config, rank, page_writer)
        self.adapters: dict[str, ResidentAdapter] = {}

    def wait_for(self, adapters: Iterable[ResidentAdapter]) -> None:
        """Wait for all: rank 0 knows when its own rows have arrived, not when these have."""
        self.wait_for_rows()

    def follow(self, command: PoolCommand) -> None:
        match command:
            case PlaceAdapter(ref, packed, allocation):
                self.adapters[ref.digest] = self.fill(ref, packed, allocation)
            case MoveBlocks(moves):
                self.move(moves)
            case RemoveAdapter(digest):
                self.remove(self.adapters.pop(digest))
            case _:
                assert_never(command)

    def _free(self, extents: Iterable[Extent], pair_block: int | None) -> None:
        pass


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
