"""The cuda backend on a CPU, with kernels that do nothing, and counters of what a card would be asked to do.

Replaced: CuPy's launcher and every Triton kernel (nothing is computed), `linear` and `logits` (uninitialised and zero
results), the capture of graphs (a replay does nothing), the thread that copies adapters. Everything else is the
product's: tables, packing, captured steps, scheduler, sampler, and torch's small operations on tensors that are on the
CPU here. Their cost is a launch's without CUDA's own 3 to 5 µs.
"""

from __future__ import annotations

import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from loray_kernels import CapturedDecoding, CapturedStep, Decoding, LinearWeights, PageWriter
from loray_kernels.cuda.graphs import Capture, DecodeGraphs, StepWords
from loray_kernels.cuda.kernels import Gather
from loray_kernels.cuda.launch import Argument
from loray_kernels.cuda.ops import CudaOps
from loray_kernels.cuda.sampling import Readback
from loray_kernels.kv import DirectWriter

_SYNCHRONISES = {"aten::_local_scalar_dense", "aten::is_nonzero", "aten::nonzero", "aten::masked_select"}
_ALLOCATES = {"aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty_strided"}
_ON_THE_HOST = {"aten::detach_", "aten::detach", "aten::_unsafe_view", "aten::resolve_conj", "aten::resolve_neg"}


class Counts:
    """Of one step. `launches`: kernels, torch's operations and replayed graphs; `replayed_kernels`: those in graphs,
    without torch's operations. `copies` and `copied_bytes`: from the host to the device. `reads`: tensors or numbers
    read back, each of which waits for the device.
    """

    def __init__(self) -> None:
        self.launches = self.replayed_kernels = self.copies = self.copied_bytes = self.reads = 0
        self.python_calls = self.python_peak_bytes = 0

    def copied(self, tensor: Tensor) -> None:
        self.copies += 1
        self.copied_bytes += tensor.nbytes


class StandInCapturer:
    """Runs a step twice, as a capture does, and keeps nothing of it. `seconds` of all of them."""

    def __init__(self, ops: StandInOps) -> None:
        self._ops = ops
        self.num_captured, self.seconds = 0, 0.0

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Capture]:
        return lambda: self._capture(run)

    def _capture(self, run: Callable[[], Tensor]) -> Capture:
        began, before = time.perf_counter(), self._ops.counts.launches
        run()
        kernels = self._ops.counts.launches - before
        out = run()
        self.num_captured += 1
        self.seconds += time.perf_counter() - began

        def replay() -> None:
            self._ops.counts.launches += 1
            self._ops.counts.replayed_kernels += kernels

        return Capture(replay, out)

    def num_bytes(self) -> int:
        return 0

    def release(self) -> None:
        """Nothing was kept."""


class StandInOps(CudaOps):
    def __init__(self) -> None:
        self.counts, self.capturer = Counts(), StandInCapturer(self)
        super().__init__(Gather(self._launch), cast(Any, _NoTiles(self)))

    def _launch(self, kernel: str, grid: tuple[int, int, int], threads: int, arguments: Sequence[Argument]) -> None:
        self.counts.launches += 1

    def page_writer(self, pool: Tensor) -> PageWriter:
        return DirectWriter(pool)

    def linear(self, x_TI: Tensor, weights: LinearWeights) -> Tensor:
        self.counts.launches += 1
        return x_TI.new_empty(x_TI.shape[0], weights.out_features)

    def logits(self, x_TD: Tensor, weights: LinearWeights) -> Tensor:
        self.counts.launches += 1
        return x_TD.new_zeros(x_TD.shape[0], weights.out_features, dtype=torch.float32)

    def captured_decoding(self, forward: Callable[[CapturedStep], Tensor], decoding: Decoding) -> CapturedDecoding:
        return DecodeGraphs(forward, decoding, self.capturer)


class _NoTiles:
    """Every method is one launch."""

    def __init__(self, ops: StandInOps) -> None:
        self._ops = ops

    def __getattr__(self, name: str) -> Callable[..., None]:
        def launch(*arguments: object) -> None:
            self._ops.counts.launches += 1

        return launch


@contextmanager
def counting(ops: StandInOps) -> Iterator[Counts]:
    """Counts of what runs inside, which takes several times as long as otherwise."""
    counts = ops.counts = Counts()
    read, send, results = Tensor.tolist, StepWords.send, Readback.read

    def tolist(tensor: Tensor) -> Any:
        counts.reads += 1
        return read(tensor)

    def read_results(readback: Readback, *arguments: Any) -> Any:
        counts.reads += 1
        counts.launches -= 1  # the copy to the host, which has been counted as one of torch's operations
        return results(readback, *arguments)

    def sent(words: StepWords, staged: Tensor) -> None:
        send(words, staged)
        counts.launches -= 1  # the copy that has just been counted as one of torch's operations
        counts.copied(staged)

    Tensor.tolist = tolist  # type: ignore[method-assign, assignment]
    try:
        with patch.object(StepWords, "send", sent), patch.object(Readback, "read", read_results), _Dispatched(counts):
            yield counts
    finally:
        Tensor.tolist = read  # type: ignore[method-assign]
        ops.counts = Counts()  # of later steps


def python_cost(counts: Counts, run: Callable[[], object], again: Callable[[], object]) -> None:
    """Function calls of `run`, and the most memory that Python's objects take during `again` beside what they had."""
    own = sys.getprofile()

    def called(frame: object, event: str, argument: object) -> None:
        counts.python_calls += event == "call"

    sys.setprofile(called)
    try:
        run()
    finally:
        sys.setprofile(own)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        again()
        counts.python_peak_bytes = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


class _Dispatched(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Torch's operations: those that would be launches, and copies of tensors that Python's numbers became."""

    def __init__(self, counts: Counts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name == "aten::lift_fresh":
            self._counts.copied(args[0])
        elif name in _SYNCHRONISES:
            self._counts.reads += 1
        elif name not in _ALLOCATES | _ON_THE_HOST and not func.is_view:
            self._counts.launches += 1
        return func(*args, **(kwargs or {}))
