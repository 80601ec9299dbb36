"""The other ranks' side: each has a part of the model and of the pool, and executes rank 0's commands."""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from loray.bases.registry import BaseModel
from loray.engine.model.decoding import DecodeBatch
from loray.engine.parallel import wire
from loray.engine.parallel.channel import (
    CODEC,
    Command,
    CompileAdapters,
    Forward,
    GetPoolMap,
    RecordSteps,
    Replay,
    UseRecordings,
)
from loray.engine.parallel.communicator import Communicator
from loray.engine.parallel.decoder import ShardedDecoder
from loray.engine.parallel.pool import FollowingPool, pool_map
from loray.engine.parallel.shard import Shard, local_device
from loray.engine.parallel.transport.meeting import joined, meeting
from loray.engine.parallel.workers import ARGUMENTS, WorkerArgs
from loray.engine.pool.sizing import sized
from loray.priority import compute_in_background
from loray.telemetry import configure_logging
from loray_kernels.memory import keep_freed


def run_worker(args: WorkerArgs, base: BaseModel, own_address: str) -> None:
    """Runs until rank 0 has ended. `own_address`: at which the other ranks reach this one."""
    spec, rank = args.spec, args.rank
    assert spec.num_threads is not None
    torch.set_num_threads(spec.num_threads)
    keep_freed()
    store = meeting(args.host, args.port, args.secret)
    device = local_device(spec, rank)  # may fail, so before `joined`: rank 0 waits for every rank that has joined
    store.set(joined(rank), "")
    if device.type == "cpu":
        compute_in_background()  # as rank 0
    communicator = Communicator(store, Shard(rank, spec.tensor_parallel_size), device, own_address, args.secret)
    model = ShardedDecoder(spec, base, communicator)
    spec = sized(spec, model.config, device, communicator.least)
    pool = FollowingPool(spec, base.config, rank, model.ops.page_writer)

    def receive_rows(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """In memory from which a device copies while steps run."""
        rows = torch.empty(shape, dtype=dtype, pin_memory=device.type == "cuda")
        communicator.receive_rows(rows, 0)
        return rows

    while True:
        try:
            message = communicator.receive(0)
        except RuntimeError:
            return
        for data in CODEC.loads(message):
            command: Command = CODEC.loads(data, receive_rows)
            match command:
                case Forward(chunks, digests):
                    model.forward(model.passed(wire.load_chunks(chunks, digests), pool), pool)
                case Replay(step):
                    model.forward(DecodeBatch(wire.load_step(step), (), ()), pool)
                case UseRecordings(num_seats, max_blocks):
                    model.use_recordings(pool, num_seats=num_seats, max_blocks=max_blocks)
                case CompileAdapters():
                    model.compile_adapters(pool)
                case RecordSteps(limits):
                    model.record(limits, lambda progress: None)
                case GetPoolMap():
                    communicator.send(CODEC.dumps(pool_map(pool)).data, 0)
                case _:
                    pool.follow(command)


def main() -> None:
    """A process on rank 0's machine; it reads its arguments from standard input."""
    args, base = ARGUMENTS.loads(sys.stdin.buffer.read())
    configure_logging("INFO")
    run_worker(args, base, args.host)


if __name__ == "__main__":
    main()
