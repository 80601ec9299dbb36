"""Ranks of tensor parallel in threads of one process, each with ShimOps of its own, whose tapes have collectives."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from loray.bases.registry import BaseModel
from loray.engine import build
from loray.engine.parallel import decoder, driver, worker
from loray.engine.parallel.communicator import Communicator
from loray.engine.parallel.worker import WorkerArgs
from loray.errors import EngineError
from tests.kernels.cuda.shim import ShimLauncher
from tests.kernels.cuda.shim_ops import ShimOps, use_shim_ops
from tests.kernels.cuda.tape import TapeLauncher, is_recording, on_tape

_END = b"end"


class TapedGroup:
    """A process group whose collectives a replay repeats, as NCCL's in a CUDA graph. The first one of its kind and size
    connects ranks, which is an AssertionError while a graph is recorded.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self._connected: set[tuple[Any, ...]] = set()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        collective = getattr(self._group, name)

        def call(*arguments: Any) -> Any:
            sizes = (name, *((x.dtype, x.shape) for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)))
            assert sizes in self._connected or not is_recording(), f"the first {name} of its size is recorded"
            self._connected.add(sizes)
            on_tape(lambda *same: collective(*same).wait(), *arguments)
            with _disable_current_modes():  # what gloo does inside is not for the tape
                return collective(*arguments)

        return call


class TapedCommunicator(Communicator):
    """`made` has all of them."""

    made: list[TapedCommunicator]

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._data: Any = TapedGroup(self._data)
        self.made.append(self)

    def receive(self, rank: int) -> bytes:
        data = super().receive(rank)
        if data == _END:
            raise RuntimeError("rank 0 has ended")
        return data


class ThreadWorkers:
    def __init__(self, args: Sequence[WorkerArgs], base: BaseModel) -> None:
        self._threads = {
            a.rank: threading.Thread(target=worker.run_worker, args=(a, base, "127.0.0.1"), daemon=True) for a in args
        }
        for thread in self._threads.values():
            thread.start()

    @staticmethod
    def own_address() -> str:
        return "127.0.0.1"

    def check(self) -> None:
        for rank, thread in self._threads.items():
            if not thread.is_alive():
                raise EngineError(f"rank {rank} has ended")

    def stop(self) -> None:
        (first,) = (c for c in TapedCommunicator.made if c.shard.rank == 0)
        for rank, thread in self._threads.items():
            if thread.is_alive():
                first.send(_END, rank)
            thread.join()
        TapedCommunicator.made.clear()


def use_shim_ranks(monkeypatch: pytest.MonkeyPatch) -> list[ShimOps]:
    """Engines that are built from now on have their ranks in threads. Their ops are in the result, in any order."""
    use_shim_ops(monkeypatch)
    ops: list[ShimOps] = []

    def backend(name: str, device: object) -> ShimOps:
        ops.append(ShimOps(TapeLauncher(ShimLauncher())))
        return ops[-1]

    monkeypatch.setattr(decoder, "backend", backend)
    monkeypatch.setattr(TapedCommunicator, "made", [], raising=False)
    for module in (driver, worker):
        monkeypatch.setattr(module, "Communicator", TapedCommunicator)
    monkeypatch.setattr(build.build_engine, "__defaults__", (None, ThreadWorkers))
    return ops
