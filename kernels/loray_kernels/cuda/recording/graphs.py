"""Decode steps as CUDA graphs: a step's launches are recorded once, before the first request, and replayed by one call.

Steps of the base, with LoRA alone and with other parts of adapters have graphs of their own, so that nobody pays for
what others bring; so have sizes. A step is padded to the next of each that has been recorded, whatever its contexts
are: attention finds its work on the device. Where nothing serves it, it is computed launch by launch: no request waits
for a recording.

Recording has not run on a GPU yet. All else is tested on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from loray_kernels.cuda.recording.padded import PaddedStep
from loray_kernels.decoding import DecodeStep, Decoding, Parts, Ranks, Recorded, RecordedStep, RecordLimits
from loray_kernels.memory import is_out_of_memory
from loray_kernels.records import Directory
from loray_kernels.sampling.draws import TokenSeats
from loray_kernels.vectors import VectorShape

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_ALL = Parts.LORA | Parts.VERA | Parts.DORA | Parts.OWN
KINDS = (Parts.NONE, Parts.LORA, Parts.VERA, Parts.LORA | Parts.DORA, Parts.LORA | Parts.OWN, _ALL)

T = TypeVar("T")


class Recording(NamedTuple):
    """`replay` repeats the recorded launches on the current stream, and so overwrites `out`."""

    replay: Callable[[], None]
    out: Tensor


class Recorder(Protocol):
    """Recordings share memory: what one of them needs is there for the next."""

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Recording]:
        """Run once, which waits for no other rank. The result, called when all ranks have run, records."""
        ...

    def num_bytes(self) -> int:
        """Memory of the device that all recordings take."""
        ...

    def release(self) -> None:
        """Give back the memory of recordings, of which none is left."""
        ...


class Form(NamedTuple):
    """What a step is padded to. `kind`: parts that its adapters may have."""

    size: int
    kind: Parts


class DecodeGraphs:
    """A RecordedDecoding."""

    def __init__(self, forward: Callable[[RecordedStep], Tensor], decoding: Decoding, recorder: Recorder) -> None:
        self._forward, self._decoding, self._recorder = forward, decoding, recorder
        num_blocks = decoding.num_seats * decoding.max_blocks + 1  # the last one is not a seat's, see StepWords
        self._blocks = torch.zeros(num_blocks, dtype=torch.int64, device=decoding.device)
        self._tokens = torch.zeros(decoding.num_seats, dtype=torch.int64, device=decoding.device)
        self._seats: TokenSeats | None = None
        self._steps: dict[Form, PaddedStep] = {}
        self._recorded: dict[Form, Recording] = {}
        self._serving: dict[Form, Form | None] = {}  # by needed form: the recorded one that serves it
        self._out_SV: Tensor | None = None  # of all recordings
        self.vectors = VectorShape.of(decoding.inputs, decoding.layout.num_layers, decoding.layout.head_dim)
        self.directory = Directory(decoding.inputs, decoding.device, reserved=self.vectors.head)
        self.max_rows = SIZES[-1]

    def __call__(self, step: DecodeStep) -> Tensor:
        num = len(step.token_ids)
        needed = Form(_least(SIZES, num), next(k for k in KINDS if step.parts in k))
        form = self._serving_of(needed)
        padded = self._step(form or needed)
        padded.words.fill(step)
        self._seats = padded.seats(num)
        if form is None:
            return self._forward(padded.step())[:num]
        recording = self._recorded[form]
        recording.replay()
        return recording.out[:num]

    @property
    def seats(self) -> TokenSeats:
        assert self._seats is not None, "a step has been computed"
        return self._seats

    def forms(self) -> Iterator[Form]:
        """All that steps may need, the most useful first, since limits may end recording.

        First what serves every step: of each size adapters with everything, with LoRA alone, and the base. Then the
        other kinds. The first form needs the most memory, which the others then share.
        """
        size = _least(SIZES, min(self._decoding.num_seats, SIZES[-1]))
        sizes = [s for s in reversed(SIZES) if s <= size]
        first = [k for k in reversed(KINDS) if k in (_ALL, Parts.LORA, Parts.NONE)]
        rest = [k for k in reversed(KINDS) if k not in first]
        for kinds in (first, rest):
            yield from (Form(s, kind) for s in sizes for kind in kinds)

    def record(self, limits: RecordLimits, on_progress: Callable[[Recorded], None]) -> Recorded:
        """Where a form does not fit into memory, smaller ones may."""
        forms = list(self.forms())
        began, taken = time.monotonic(), self._recorder.num_bytes()
        largest, adds = forms[0].size, 0  # `adds`: what a further form takes beside the memory that all share
        progress = Recorded(0, len(forms), 0.0, 0)
        agree = self._decoding.ranks.agree
        for form in forms:
            if form.size > largest:
                continue
            left = limits.num_bytes - progress.num_bytes
            if not agree(time.monotonic() - began < limits.seconds and max(adds, 1) <= left):
                break
            recording = self._recording(form)
            num_bytes = self._recorder.num_bytes() - taken
            fits = bool(self._recorded) or num_bytes <= limits.num_bytes
            if not agree(recording is not None and fits) or recording is None:
                del recording
                largest = form.size - 1
                if not self._recorded:
                    self._release(form)
                continue
            adds = num_bytes - progress.num_bytes if self._recorded else 0
            self._recorded[form] = recording
            progress = Recorded(len(self._recorded), len(forms), time.monotonic() - began, num_bytes)
            on_progress(progress)
        self._serving.clear()
        return progress

    def _release(self, form: Form) -> None:
        """The only form that has been computed leaves nothing on the device."""
        self._steps.pop(form, None)
        self._out_SV = None
        self._recorder.release()

    def _recording(self, form: Form) -> Recording | None:
        """None if the memory of the device, or of another rank's for the run before, is too small."""
        record = _unless_full(lambda: self._recorder(partial(self._compute, form)))
        if not self._decoding.ranks.agree(record is not None) or record is None:
            return None
        return _unless_full(record)

    def _compute(self, form: Form) -> Tensor:
        """All recordings write their results into one tensor, since each has size × vocabulary × 4 bytes."""
        logits_SV = self._forward(self._step(form).step())
        if self._out_SV is None or self._out_SV.shape[0] < form.size:
            self._out_SV = torch.empty_like(logits_SV)
        return self._out_SV[: form.size].copy_(logits_SV)

    def _step(self, form: Form) -> PaddedStep:
        if form not in self._steps:
            self._steps[form] = PaddedStep(
                form.size,
                self._blocks,
                self._tokens,
                self._decoding,
                form.kind,
                self.directory.records,
                self.vectors,
            )
        return self._steps[form]

    def _serving_of(self, needed: Form) -> Form | None:
        """The smallest recorded form that holds it: of its own kind, or else of one with more parts."""
        if needed not in self._serving:
            size, kind = needed
            found = (f for f in self._recorded if f.size >= size and kind in f.kind)
            self._serving[needed] = min(found, key=lambda f: (KINDS.index(f.kind), f), default=None)
        return self._serving[needed]


def _least(sizes: Sequence[int], needed: int) -> int:
    return next(size for size in sizes if size >= needed)


def _unless_full(call: Callable[[], T]) -> T | None:
    """None if the device's memory is too small."""
    try:
        return call()
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        return None


class GraphRecorder:
    """CUDA graphs that share their memory, since only one is replayed at a time. The run before a recording is silent,
    then collectives are called that it would have been the first to need, and what is recorded is not executed.
    """

    def __init__(self, device: torch.device, ranks: Ranks) -> None:
        self._device, self._memory, self._ranks = device, torch.cuda.graph_pool_handle(), ranks
        # One for all recordings, since cuBLAS keeps a workspace for each stream: 32 MiB on a card of 2022.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Recording]:
        """Compiles kernels and initialises libraries."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), self._ranks.silent():
            run()
        current.wait_stream(self._stream)
        return lambda: self._record(run)

    def _record(self, run: Callable[[], Tensor]) -> Recording:
        with torch.cuda.stream(self._stream):
            self._ranks.connect()
        graph = torch.cuda.CUDAGraph()
        # Threads that load adapters may allocate pinned memory meanwhile, which must not break this recording.
        with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
            out = run()
        return Recording(graph.replay, out)

    def num_bytes(self) -> int:
        """What the whole device has in use, without what torch keeps free: graphs take memory of the driver too."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free

    def release(self) -> None:
        """Memory that no graph shares any more cannot be recorded into again, so the next one has another."""
        torch.cuda.empty_cache()
        self._memory = torch.cuda.graph_pool_handle()
