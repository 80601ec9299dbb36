"""The other ranks' side: hold a part of the model and of the pool, and do what rank 0 says."""

from __future__ import annotations

import pickle
import sys

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from loray.bases.registry import BaseModel
from loray.engine.parallel import wire
from loray.engine.parallel.channel import AskMap, Command, Forward
from loray.engine.parallel.communicator import Communicator
from loray.engine.parallel.decoder import ShardedDecoder
from loray.engine.parallel.pool import FollowingPool, pool_map
from loray.engine.parallel.shard import Shard, local_device
from loray.engine.parallel.workers import WorkerArgs
from loray.telemetry import configure_logging


def joined(rank: int) -> str:
    """Key of the store that says that this rank has come up."""
    return f"joined-{rank}"


def run_worker(args: WorkerArgs, base: BaseModel, host: str) -> None:
    """Until rank 0, at `host`, is gone."""
    spec, rank = args.spec, args.rank
    assert spec.num_threads is not None
    torch.set_num_threads(spec.num_threads)
    store = TCPStore(host, args.port, is_master=False)
    device = local_device(spec, rank)  # what may fail comes first: rank 0 waits for whoever has joined
    store.set(joined(rank), "")
    communicator = Communicator(store, Shard(rank, spec.tensor_parallel_size), device)
    model = ShardedDecoder(spec, base, communicator)
    pool = FollowingPool(spec, base.config, rank, model.ops.page_writer)
    while True:
        try:
            message = communicator.receive(0)
        except RuntimeError:
            return
        for data in pickle.loads(message):
            command: Command = wire.loads(data, pool.tensor.device, pool.adapters, pool.pair)
            match command:
                case Forward(batch):
                    model.forward(batch, pool)
                case AskMap():
                    communicator.send(pickle.dumps(pool_map(pool)), 0)
                case _:
                    pool.follow(command)


def main() -> None:
    """A process of rank 0's machine; its arguments come by standard input."""
    args, base = pickle.load(sys.stdin.buffer)
    configure_logging("INFO")
    run_worker(args, base, "127.0.0.1")


if __name__ == "__main__":
    main()
