"""Engines whose steps a test makes and looks at; ranks of tensor parallel in threads, whose tapes have collectives."""

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
from loray.engine.engine import Engine
from loray.engine.parallel import decoder, driver, worker
from loray.engine.parallel.communicator import Communicator
from loray.engine.parallel.worker import WorkerArgs
from loray.engine.request import Chunk
from loray.errors import EngineError
from loray.spec import GenerateRequest
from loray_kernels.reference import ReferenceOps
from tests.fixtures.engines import request, submit
from tests.fixtures.peft_adapters import TestAdapter
from tests.fixtures.shim import ShimLauncher
from tests.fixtures.shim_ops import ShimOps, use_shim_ops
from tests.fixtures.tape import TapeLauncher, is_recording, on_tape

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


def mixture(
    num: int,
    adapters: Sequence[TestAdapter | None],
    max_tokens: Callable[[int], int],
    sampling: Sequence[dict[str, Any]],
) -> list[GenerateRequest]:
    """Requests with prompts of different lengths, which have the adapters and the sampling by turns."""
    return [
        request(
            str(i),
            range(3 + i, 12 + i + 5 * (i % 7)),
            adapters[i % len(adapters)],
            max_tokens=max_tokens(i),
            **sampling[i % len(sampling)],
        )
        for i in range(num)
    ]


def served(engine: Engine, requests: Sequence[GenerateRequest], joins: int) -> dict[str, list[int]]:
    """Tokens by request. They come `joins` at a time, each time when a few steps have been made, whatever time adapters
    take to load.
    """
    out: dict[str, list[int]] = {r.request_id: [] for r in requests}
    waiting, loaded = list(requests), threading.Event()
    engine.wake = loaded.set
    while waiting or engine.has_work:
        submit(engine, waiting[:joins])
        del waiting[:joins]
        for _ in range(4 if waiting else 1):
            loaded.clear()
            tokens = engine.step()
            while engine.idle and engine.has_work:
                assert loaded.wait(30)
                loaded.clear()
                tokens += engine.step()
            for token in tokens:
                assert token.error is None
                assert token.token_id is not None
                out[token.request_id].append(token.token_id)
            engine.check_integrity()
    return out


def decode_steps_of(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Batches of steps from now on in which all requests decode."""
    batch, found = engine._model.batch, []

    def batched(chunks: list[Chunk], *arguments: Any) -> Any:
        made = batch(chunks, *arguments)
        if made is not None and all(c.num_tokens == 1 and c.request.output_ids and c.is_last for c in chunks):
            found.append(made)
        return made

    monkeypatch.setattr(engine._model, "batch", batched)
    return found


def use_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that are built from now on compute with torch's ops."""
    ops = ReferenceOps()
    monkeypatch.setattr(build, "backend", lambda name, device: ops)
