"""Starting the other ranks. The caller chooses where and how; LocalWorkers are processes of this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from loray.bases.config import ModelConfig
from loray.bases.registry import BaseModel
from loray.engine.parallel.transport.codec import Codec
from loray.errors import EngineError
from loray.spec import RopeParameters, ServeSpec


class WorkerArgs(NamedTuple):
    """What a rank needs to join rank 0, which listens at `host` and `port`. `spec.num_threads` is given. Who does not
    know the `secret` is no rank.
    """

    spec: ServeSpec
    rank: int
    host: str
    port: int
    secret: bytes


ARGUMENTS = Codec((WorkerArgs, ServeSpec, BaseModel, ModelConfig, RopeParameters))  # of a process


class Workers(Protocol):
    """Ranks 1, 2 … of one engine. May be called from any thread."""

    def check(self) -> None:
        """EngineError if one of them has ended."""
        ...

    def stop(self) -> None:
        """End them."""
        ...


class StartWorkers(Protocol):
    """Rank 0 calls it with the other ranks' arguments and its base."""

    def own_address(self) -> str:
        """Of this machine, at which the other ranks reach rank 0. Nothing listens at another one."""
        ...

    def __call__(self, args: Sequence[WorkerArgs], base: BaseModel, /) -> Workers: ...


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
    """Threads of one rank. All ranks of an engine compute at the same time."""
    return spec.num_threads or max(1, len(os.sched_getaffinity(0)) // spec.tensor_parallel_size)
