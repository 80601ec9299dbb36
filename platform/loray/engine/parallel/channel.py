"""What rank 0 tells the other ranks. Commands wait for the next step or question and go as one message."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from typing import Any, NamedTuple

from loray.engine.model.batch import Batch
from loray.engine.parallel import wire
from loray.engine.parallel.communicator import Communicator
from loray.engine.pool.packed import PackedAdapter
from loray.errors import EngineError
from loray.spec import AdapterRef

Answers = tuple[Any, ...]  # of the allocator, in the order in which the pool asks


class Forward(NamedTuple):
    batch: Batch


class PlaceAdapter(NamedTuple):
    ref: AdapterRef
    packed: PackedAdapter
    answers: Answers


class RemoveAdapter(NamedTuple):
    digest: str


class Compact(NamedTuple):
    num_blocks: int
    answers: Answers


class AskMap(NamedTuple):
    """Answered with `pool.pool_map`."""


Command = Forward | PlaceAdapter | RemoveAdapter | Compact | AskMap


class Channel:
    """Rank 0's end. Commands are carried out in the order in which they are told."""

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self.world_size = communicator.shard.world_size
        self._waiting: list[list[bytes]] = [[] for _ in range(1, self.world_size)]

    def tell(self, command: Command) -> None:
        """All of them the same."""
        data = wire.dumps(command)
        for waiting in self._waiting:
            waiting.append(data)

    def tell_each(self, commands: Sequence[Command]) -> None:
        """Ranks 1, 2 … each its own."""
        for waiting, command in zip(self._waiting, commands, strict=True):
            waiting.append(wire.dumps(command))

    def flush(self) -> None:
        """EngineError where a rank is gone."""
        for rank, waiting in enumerate(self._waiting, 1):
            try:
                self._communicator.send(pickle.dumps(waiting), rank)
            except RuntimeError as e:
                raise EngineError(f"rank {rank} of the engine is gone: {e}") from e
            waiting.clear()

    def ask(self, question: Command) -> list[Any]:
        """The answers of ranks 1, 2 …"""
        self.tell(question)
        self.flush()
        return [pickle.loads(self._communicator.receive(rank)) for rank in range(1, self.world_size)]
