"""Commands from rank 0 to the other ranks: collected, and sent as one message with the next step or call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from loray.adapters.weights import ProjectionPair
from loray.engine.memory.blocks import Extent, Kind
from loray.engine.memory.rows import AdapterShape, LayerGroup, Matrix
from loray.engine.parallel.communicator import Communicator
from loray.engine.parallel.transport.codec import Codec, Packed
from loray.engine.pool.packed import PackedAdapter
from loray.engine.pool.resident import Record
from loray.errors import RankLost
from loray.spec import AdapterRef, RopeParameters
from loray_kernels import Parts, RecordLimits

# Results of allocate_rows, allocate_run and clear_run of the allocator, in the order of the calls.
Answer = list[Extent] | int | dict[int, int] | None
Answers = tuple[Answer, ...]


class Forward(NamedTuple):
    """The last command of a message, as Replay is: the ranks compute it together. See `wire`."""

    chunks: bytes
    digests: tuple[str, ...]


class Replay(NamedTuple):
    """A recorded decode step, see `wire`."""

    step: bytes


class PlaceAdapter(NamedTuple):
    ref: AdapterRef
    packed: PackedAdapter
    answers: Answers


class RemoveAdapter(NamedTuple):
    digest: str


class Compact(NamedTuple):
    num_blocks: int
    answers: Answers


class GetPoolMap(NamedTuple):
    """The answer is the PoolMap of the rank's pool."""


class UseRecordings(NamedTuple):
    num_seats: int
    max_blocks: int


class CompileAdapters(NamedTuple):
    pass


class RecordSteps(NamedTuple):
    limits: RecordLimits


PoolCommand = PlaceAdapter | RemoveAdapter | Compact
ModelCommand = Forward | Replay | UseRecordings | CompileAdapters | RecordSteps
Command = PoolCommand | ModelCommand | GetPoolMap


class AdapterPlace(NamedTuple):
    """Where an adapter and its record are. `first_pair_block` None: it has no VeRA pair."""

    extents: tuple[Extent, ...]
    shape: AdapterShape
    first_pair_block: int | None
    record: Record | None


PoolMap = dict[str, AdapterPlace]  # by digest

# The classes of all commands and answers, and of what they consist of.
CODEC = Codec(
    (
        Forward,
        Replay,
        PlaceAdapter,
        RemoveAdapter,
        Compact,
        GetPoolMap,
        UseRecordings,
        CompileAdapters,
        RecordSteps,
        RecordLimits,
        AdapterRef,
        PackedAdapter,
        AdapterShape,
        LayerGroup,
        Matrix,
        ProjectionPair,
        RopeParameters,
        AdapterPlace,
        Extent,
        Kind,
        Record,
        Parts,
    )
)


class Channel:
    """Rank 0's end. The other ranks execute commands in the order of these calls."""

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self.world_size = communicator.shard.world_size
        self._waiting: list[list[Packed]] = [[] for _ in range(1, self.world_size)]

    def broadcast(self, command: Command) -> None:
        """The same command to all ranks."""
        packed = CODEC.dumps(command)
        for waiting in self._waiting:
            waiting.append(packed)

    def scatter(self, commands: Sequence[Command]) -> None:
        """One command each to ranks 1, 2 … Their tensors are rows of adapters, which stay in host memory."""
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
