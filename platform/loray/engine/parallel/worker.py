"""The ranks beside the first: how they are started, and what each runs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from loray.bases.config import Experts, LayerSpec, ModelConfig
from loray.bases.registry import BaseModel
from loray.engine.model.decode_batch import DecodeBatch
from loray.engine.parallel.communicator import Communicator, load_chunks, load_step
from loray.engine.parallel.decoder import ShardedDecoder
from loray.engine.parallel.pool import (
    CODEC,
    CaptureSteps,
    Command,
    CompileAdapters,
    FollowingPool,
    Forward,
    GetPoolMap,
    Replay,
    UseCaptures,
    pool_map,
)
from loray.engine.parallel.shard import Shard, local_device
from loray.engine.parallel.transport import Codec, joined, meeting
from loray.engine.pool.device_memory import sized
from loray.errors import EngineError
from loray.priority import compute_in_background
from loray.spec import RopeParameters, ServeSpec
from loray.telemetry import configure_logging
from loray_kernels.memory import keep_freed


class WorkerArgs(NamedTuple):
    """The arguments with which a rank joins rank 0, which listens at `host` and `port`. `spec.num_threads` is given.
    Who does not know the `secret` is no rank.
    """

    spec: ServeSpec
    rank: int
    host: str
    port: int
    secret: bytes


ARGUMENTS = Codec((WorkerArgs, ServeSpec, BaseModel, ModelConfig, LayerSpec, Experts, RopeParameters))  # of a process


class RankWorkers(Protocol):
    """Ranks 1, 2 … of one engine. May be called from any thread."""

    def check(self) -> None:
        """Raise EngineError if one of them has ended."""
        ...

    def stop(self) -> None:
        """End them."""
        ...


class StartWorkers(Protocol):
    """Rank 0 calls it with the other ranks' arguments and its base."""

    def own_address(self) -> str:
        """Give this machine's address at which the other ranks reach rank 0. Nothing listens at another one."""
        ...

    def __call__(self, args: Sequence[WorkerArgs], base: BaseModel, /) -> RankWorkers: ...


class LocalWorkers:
    """Processes. They end when rank 0 does."""

    def __init__(self, args: Sequence[WorkerArgs], base: BaseModel) -> None:
        self._processes: list[subprocess.Popen[bytes]] = []
        try:
            for arg in args:
                self._start(arg, base)
        except OSError as e:
            self.stop()
            raise EngineError(f"a rank of the engine did not start: {e}") from e

    @staticmethod
    def own_address() -> str:
        return "127.0.0.1"

    def _start(self, arg: WorkerArgs, base: BaseModel) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "loray.engine.parallel.worker"],
            stdin=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": str(arg.spec.num_threads)},
            process_group=0,  # Ctrl-C is for rank 0, which lets its requests end
        )
        self._processes.append(process)
        assert process.stdin is not None
        process.stdin.write(ARGUMENTS.dumps((arg, base)).data)
        process.stdin.close()

    def check(self) -> None:
        for rank, process in enumerate(self._processes, 1):
            if process.poll() is not None:
                raise EngineError(f"rank {rank} of the engine has ended with {process.returncode}; see its log")

    def stop(self) -> None:
        for process in self._processes:
            process.kill()  # they have no state to save
        for process in self._processes:
            process.wait()


def num_threads(spec: ServeSpec) -> int:
    """Count the threads of one rank. All ranks of an engine compute at the same time."""
    return spec.num_threads or max(1, len(os.sched_getaffinity(0)) // spec.tensor_parallel_size)


def run_worker(args: WorkerArgs, base: BaseModel, own_address: str) -> None:
    """Run a rank until rank 0 has ended. `own_address`: at which the other ranks reach this one."""
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
        # A device copies from pinned memory while steps run.
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
                    inputs = load_chunks(chunks, [pool.adapters[digest] for digest in digests])
                    model.forward(model.eager(inputs, pool), pool)
                case Replay(step):
                    model.forward(DecodeBatch(load_step(step), (), ()), pool)
                case UseCaptures(num_slots, max_blocks):
                    model.use_captures(pool, num_slots=num_slots, max_blocks=max_blocks)
                case CompileAdapters():
                    model.compile_adapters(pool)
                case CaptureSteps(limits):
                    model.capture(limits, lambda progress: None)
                case GetPoolMap():
                    communicator.send(CODEC.dumps(pool_map(pool)).data, 0)
                case _:
                    pool.follow(command)


def main() -> None:
    """Run a rank as a process on rank 0's machine; it reads its arguments from standard input."""
    args, base = ARGUMENTS.loads(sys.stdin.buffer.read())
    configure_logging("INFO")
    run_worker(args, base, args.host)


if __name__ == "__main__":
    main()
