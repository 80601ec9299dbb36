"""Rank 0's side: the engine's model and pool send each command to the other ranks before they execute it themselves."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from loray.bases.registry import BaseModel
from loray.engine.memory.blocks import Geometry
from loray.engine.model.batch import Batch, ChunkInput
from loray.engine.model.decode_batch import DecodeBatch
from loray.engine.parallel.communicator import Communicator, dump_chunks, dump_step
from loray.engine.parallel.decoder import ShardedDecoder
from loray.engine.parallel.pool import (
    CaptureSteps,
    Channel,
    Command,
    CompileAdapters,
    Forward,
    GetPoolMap,
    LeadingPool,
    Replay,
    UseCaptures,
)
from loray.engine.parallel.shard import Shard, check_divisible, local_device, sharded_loads
from loray.engine.parallel.transport import SECRET_BYTES, joined, open_meeting
from loray.engine.parallel.worker import RankWorkers, StartWorkers, WorkerArgs
from loray.engine.pool.device_memory import sized
from loray.engine.pool.loader import LoadAdapter
from loray.engine.pool.pool import Pool, cut_pool
from loray.errors import EngineError, RankLost
from loray.spec import ServeSpec
from loray_kernels import CaptureLimits, CaptureState

_POLL_S = 0.02


class StartedRanks(NamedTuple):
    """The parts of an engine with several ranks. `spec`: with the bytes of the pool."""

    spec: ServeSpec
    model: ShardedDecoder
    pool: LeadingPool
    load: LoadAdapter
    workers: RankWorkers


class LeadingDecoder(ShardedDecoder):
    def __init__(self, spec: ServeSpec, base: BaseModel, communicator: Communicator, channel: Channel) -> None:
        super().__init__(spec, base, communicator)
        self._channel = channel
        self._passed: tuple[Tensor | None, Forward] = None, Forward(b"", ())  # of the last batch, by its tokens

    def eager(self, inputs: Sequence[ChunkInput], pool: Pool) -> Batch:
        batch = super().eager(inputs, pool)
        self._passed = batch.token_ids_T, Forward(*dump_chunks(inputs))
        return batch

    def forward(
        self,
        batch: Batch | DecodeBatch,
        pool: Pool,
        on_scored: Callable[[Tensor], None] = lambda logits_RV: None,
        on_pooled: Callable[[Tensor], None] = lambda x_PD: None,
    ) -> Tensor:
        """Compute a step on all ranks. RankLost if it fails on one."""
        if isinstance(batch, Batch):
            tokens_T, command = self._passed
            assert batch.token_ids_T is tokens_T, "a batch is computed before the next one is made"
            self._send(command)
        else:
            self._send(Replay(dump_step(batch.step)))
        with self._together("a step"):
            return super().forward(batch, pool, on_scored, on_pooled)

    def slots(self, batch: Batch | DecodeBatch) -> None:
        """Give no slots: tokens are drawn on this rank alone, and the others are sent them."""

    def use_captures(self, pool: Pool, *, num_slots: int, max_blocks: int) -> None:
        super().use_captures(pool, num_slots=num_slots, max_blocks=max_blocks)
        if self.can_capture:
            self._send(UseCaptures(num_slots, max_blocks))

    def compile_adapters(self, pool: Pool) -> None:
        self._send(CompileAdapters())
        super().compile_adapters(pool)

    def capture(self, limits: CaptureLimits, on_progress: Callable[[CaptureState], None]) -> CaptureState | None:
        """Capture steps on all ranks. RankLost if one ends meanwhile."""
        if not self.can_capture:
            return None
        self._send(CaptureSteps(limits))
        with self._together("recording steps"):
            return super().capture(limits, on_progress)

    def _send(self, command: Command) -> None:
        self._channel.broadcast(command)
        self._channel.flush()

    @contextmanager
    def _together(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as e:
            raise RankLost(f"{what} over {self._channel.world_size} ranks failed: {e}") from e


def start_ranks(spec: ServeSpec, base: BaseModel, load: LoadAdapter, start_workers: StartWorkers) -> StartedRanks:
    """Start the other ranks, and make this one. SpecError if the ranks do not divide the base, EngineError if a rank
    does not start.
    """
    world_size = spec.tensor_parallel_size
    check_divisible(base.config, world_size)
    if spec.fixed_pool_bytes is not None:
        cut_pool(spec, base.config)  # what cannot be is told before a rank starts
    host, secret = start_workers.own_address(), secrets.token_bytes(SECRET_BYTES)
    store, port = open_meeting(host, secret)
    args = [WorkerArgs(spec, rank, host, port, secret) for rank in range(1, world_size)]
    workers = start_workers(args, base)
    try:
        while not store.check([joined(a.rank) for a in args]):
            workers.check()
            time.sleep(_POLL_S)
        communicator = Communicator(store, Shard(0, world_size), local_device(spec, 0), host, secret)
        channel = Channel(communicator)
        model = LeadingDecoder(spec, base, communicator, channel)
        spec = sized(spec, model.config, local_device(spec, 0), communicator.least)
        pool = LeadingPool(spec, base.config, channel, model.ops.page_writer)
        channel.call(GetPoolMap())  # when all ranks have answered, all are ready
    except RuntimeError as e:
        workers.stop()
        raise EngineError(f"a rank of the engine did not come up; see its log: {e}") from e
    except BaseException:
        workers.stop()
        raise
    layout, num_blocks = cut_pool(spec, base.config)
    whole = Geometry(num_blocks, layout.num_layers, layout.block_tokens, layout.layer_share)
    return StartedRanks(spec, model, pool, sharded_loads(load, whole, world_size), workers)
