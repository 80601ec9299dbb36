"""Decode steps as CUDA graphs.

Whatever changes from step to step stands in tensors that stay in place, since a captured step contains their addresses.
Padding has no context, and its keys and values are not written.

Steps of the base, with LoRA alone and with other parts of adapters have graphs of their own, so that nobody pays for
what others bring; so have sizes. A step is padded to the next of each that has been captured, whatever its contexts
are: attention finds its work on the device. Where nothing serves it, it is computed launch by launch: no request waits
for a capture.

Capturing has not run on a GPU yet. All else is tested on a CPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from loray_kernels.cuda.tables import AttentionTables, CapturedVectors, Items, num_splits, pack_attention, upload
from loray_kernels.decode import (
    CaptureBarrier,
    CapturedStep,
    CaptureLimits,
    CaptureState,
    DecodeStep,
    Decoding,
    Parts,
    StepDescriptors,
)
from loray_kernels.descriptors import DescriptorAllocator, DescriptorTable, VectorShape
from loray_kernels.kv import AttentionMeta
from loray_kernels.memory import is_out_of_memory
from loray_kernels.sampling import TokenSlots

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_ALL = Parts.LORA | Parts.VERA | Parts.SCALE | Parts.OWN
KINDS = (Parts.NONE, Parts.LORA, Parts.VERA, Parts.LORA | Parts.SCALE, Parts.LORA | Parts.OWN, _ALL)
_MORE_BLOCKS = 1024  # that go up with a step beside one for each of its sequences; more are a copy of their own

T = TypeVar("T")


class PaddedStep:
    """A step of `size` sequences, computed on the device from its words and the block tables of all slots.

    The words are token ids (−1: the one drawn before), positions, slots, items of adapters; with vectors their starts,
    pairs and own embedding rows; then places and blocks of a new block for each sequence, which the step itself writes
    to the tables; then those of more, which are written before it. They go up from two pinned copies by turns: what
    was computed from one has been read before it is written again.

    blocks  the tables, and an element that nobody reads, for what is no new block
    tokens  by slot, that the step before has drawn
    """

    def __init__(
        self,
        size: int,
        blocks: Tensor,
        tokens: Tensor,
        decoding: Decoding,
        parts: Parts = Parts.NONE,
        table: DescriptorTable | None = None,
        shape: VectorShape | None = None,
    ) -> None:
        device = blocks.device
        self._size, self._blocks, self._nowhere = size, blocks, len(blocks) - 1
        self._tokens, self._decoding = tokens, decoding
        self._parts, self._table, self._shape = parts, table, shape
        self._has_vectors = bool(parts & ~Parts.LORA)
        self._num = (11 if self._has_vectors else 6) * size
        num_words = self._num + 2 * size + 2 * _MORE_BLOCKS
        self._words = torch.zeros(num_words, dtype=torch.int64, device=device)
        self._words[size : 2 * size] = -1  # the run before a capture writes no keys,
        self._words[self._num : self._num + size] = self._nowhere  # and no tables
        self._staged = [torch.zeros(num_words, dtype=torch.int64, pin_memory=blocks.is_cuda) for _ in range(2)]
        self._views = [staged.numpy() for staged in self._staged]
        self._turn = 0
        self._numbers = torch.arange(size + 1, device=device)
        self._decoded = Items(self._numbers[:size].repeat_interleave(2).contiguous(), size)
        self._prefilled = Items(torch.zeros(0, dtype=torch.int64, device=device), 0)

    def fill(self, step: DecodeStep) -> None:
        """Stage the numbers of a step of at most `size` sequences, and send them; the rest is padding."""
        size, num, new = self._size, len(step.token_ids), len(step.places)
        self._turn ^= 1
        view = self._views[self._turn]
        view[:num] = step.token_ids
        view[size : size + num] = step.positions
        view[size + num : 2 * size] = -1
        view[2 * size : 2 * size + num] = step.slots
        view[3 * size : 3 * size + len(step.items)] = step.items
        view[3 * size + len(step.items) : self._num] = 0
        if self._has_vectors:
            view[6 * size : 10 * size] = 0
            view[6 * size : 6 * size + len(step.vectors)] = step.vectors
            view[7 * size : 7 * size + len(step.pairs)] = step.pairs
            view[10 * size : 10 * size + len(step.own_rows)] = step.own_rows
            view[10 * size + len(step.own_rows) : self._num] = -1
        first, used = self._num, self._num + 2 * size
        view[first : first + size] = self._nowhere
        if new <= size:
            view[first : first + new] = step.places
            view[first + size : first + size + new] = step.blocks
        elif new <= _MORE_BLOCKS:
            view[used : used + new] = step.places
            view[used + new : used + 2 * new] = step.blocks
            self._send(self._staged[self._turn][: used + 2 * new])
            self._blocks.index_copy_(0, self._words[used : used + new], self._words[used + new : used + 2 * new])
            return
        else:
            self._blocks.index_copy_(0, *upload(self._blocks.device, step.places, step.blocks))
        self._send(self._staged[self._turn][:used])

    def _send(self, staged: Tensor) -> None:
        """Queue the step's one copy to the device. It waits for nothing."""
        self._words[: staged.shape[0]].copy_(staged, non_blocking=True)

    def slots(self, num: int) -> TokenSlots:
        """Say where the tokens of the first `num` rows are drawn to."""
        return TokenSlots(self._words[2 * self._size : 2 * self._size + num], self._tokens)

    def step(self) -> CapturedStep:
        size, words, block_tokens = self._size, self._words, self._decoding.layout.block_tokens
        new_S, new_blocks_S = words[self._num : self._num + 2 * size].view(2, size)
        self._blocks.index_copy_(0, new_S, new_blocks_S)
        known_S, positions_S, slots_S = words[: 3 * size].view(3, size)
        token_ids_S = torch.where(known_S < 0, self._tokens[slots_S], known_S)
        at_S, start_S = positions_S.clamp(min=0), slots_S * self._decoding.max_blocks
        block_S = self._blocks[start_S + at_S // block_tokens]
        slots_S = torch.where(positions_S < 0, -1, block_S * block_tokens + at_S % block_tokens)
        meta = AttentionMeta(tuple(range(size + 1)), (0,) * size, (), slots_S)
        meta.prepared[pack_attention] = AttentionTables(
            query_start=self._numbers,
            context_len=positions_S + 1,
            table_start=start_S,
            blocks=self._blocks,
            decoded=self._decoded,
            prefilled=self._prefilled,
            max_splits=num_splits(self._decoding.max_blocks * block_tokens),
        )
        if not self._parts or self._table is None:
            return CapturedStep(token_ids_S, at_S, meta, None)
        items_S3, vectors = words[3 * size : 6 * size].view(size, 3), None
        if self._has_vectors and self._shape is not None:
            pairs_S3 = words[7 * size : 10 * size].view(size, 3)
            vectors = CapturedVectors(self._table, self._shape, words[6 * size : 7 * size], pairs_S3)
        descriptors = StepDescriptors(self._table, items_S3, self._parts, vectors)
        own_rows = None
        if vectors is not None and Parts.OWN in self._parts:
            own_rows = vectors.embedding_rows(words[10 * size : 11 * size])
        return CapturedStep(token_ids_S, at_S, meta, descriptors, own_rows)


class Capture(NamedTuple):
    """`replay` repeats the captured launches on the current stream, and so overwrites `out`."""

    replay: Callable[[], None]
    out: Tensor


class Capturer(Protocol):
    """Captures share memory: what one of them needs is there for the next."""

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Capture]:
        """Run once, which waits for no other rank. The result, called when all ranks have run, captures."""
        ...

    def num_bytes(self) -> int:
        """Count the memory of the device that all captures take."""
        ...

    def release(self) -> None:
        """Give back the memory of captures, of which none is left."""
        ...


class GraphShape(NamedTuple):
    """The shape to which a step is padded. `kind`: parts that its adapters may have."""

    size: int
    kind: Parts


class DecodeGraphs:
    """A CapturedDecoding whose captures are CUDA graphs."""

    def __init__(self, forward: Callable[[CapturedStep], Tensor], decoding: Decoding, capturer: Capturer) -> None:
        self._forward, self._decoding, self._capturer = forward, decoding, capturer
        num_blocks = decoding.num_slots * decoding.max_blocks + 1  # the last one is not a slot's, see PaddedStep
        self._blocks = torch.zeros(num_blocks, dtype=torch.int64, device=decoding.device)
        self._tokens = torch.zeros(decoding.num_slots, dtype=torch.int64, device=decoding.device)
        self._slots: TokenSlots | None = None
        self._steps: dict[GraphShape, PaddedStep] = {}
        self._captured: dict[GraphShape, Capture] = {}
        self._serving: dict[GraphShape, GraphShape | None] = {}  # by needed shape: the captured one that serves it
        self._out_SV: Tensor | None = None  # of all captures
        self.vectors = VectorShape.of(decoding.inputs, decoding.layout.num_layers, decoding.layout.head_dim)
        self.descriptors = DescriptorAllocator(decoding.inputs, decoding.device, reserved=self.vectors.head)
        self.max_rows = SIZES[-1]

    def __call__(self, step: DecodeStep) -> Tensor:
        num = len(step.token_ids)
        needed = GraphShape(_padded_size(num), next(k for k in KINDS if step.parts in k))
        shape = self._serving_of(needed)
        padded = self._step(shape or needed)
        padded.fill(step)
        self._slots = padded.slots(num)
        if shape is None:
            return self._forward(padded.step())[:num]
        capture = self._captured[shape]
        capture.replay()
        return capture.out[:num]

    @property
    def slots(self) -> TokenSlots:
        assert self._slots is not None, "a step has been computed"
        return self._slots

    def shapes(self) -> Iterator[GraphShape]:
        """List all shapes that steps may need, the most useful first, since limits may end capturing.

        First what serves every step: of each size adapters with everything, with LoRA alone, and the base. Then the
        other kinds. The first shape needs the most memory, which the others then share.
        """
        size = _padded_size(min(self._decoding.num_slots, SIZES[-1]))
        sizes = [s for s in reversed(SIZES) if s <= size]
        first = [k for k in reversed(KINDS) if k in (_ALL, Parts.LORA, Parts.NONE)]
        rest = [k for k in reversed(KINDS) if k not in first]
        for kinds in (first, rest):
            yield from (GraphShape(s, kind) for s in sizes for kind in kinds)

    def capture(self, limits: CaptureLimits, on_progress: Callable[[CaptureState], None]) -> CaptureState:
        """Capture all shapes; where one does not fit into memory, smaller ones may."""
        shapes = list(self.shapes())
        began, taken = time.monotonic(), self._capturer.num_bytes()
        largest, adds = shapes[0].size, 0  # `adds`: what a further shape takes beside the memory that all share
        progress = CaptureState(0, len(shapes), 0.0, 0)
        agree = self._decoding.ranks.agree
        for shape in shapes:
            if shape.size > largest:
                continue
            left = limits.num_bytes - progress.num_bytes
            if not agree(time.monotonic() - began < limits.seconds and max(adds, 1) <= left):
                break
            capture = self._capture(shape)
            num_bytes = self._capturer.num_bytes() - taken
            fits = bool(self._captured) or num_bytes <= limits.num_bytes
            if not agree(capture is not None and fits) or capture is None:
                del capture
                largest = shape.size - 1
                if not self._captured:  # the only shape that has been computed leaves nothing on the device
                    self._steps.pop(shape, None)
                    self._out_SV = None
                    self._capturer.release()
                continue
            adds = num_bytes - progress.num_bytes if self._captured else 0
            self._captured[shape] = capture
            progress = CaptureState(len(self._captured), len(shapes), time.monotonic() - began, num_bytes)
            on_progress(progress)
        self._serving.clear()
        return progress

    def _capture(self, shape: GraphShape) -> Capture | None:
        """Capture; None if the memory of the device, or of another rank's for the run before, is too small."""
        capture = _unless_full(lambda: self._capturer(partial(self._compute, shape)))
        if not self._decoding.ranks.agree(capture is not None) or capture is None:
            return None
        return _unless_full(capture)

    def _compute(self, shape: GraphShape) -> Tensor:
        # All captures write their results into one tensor, since each has size × vocabulary × 4 bytes.
        logits_SV = self._forward(self._step(shape).step())
        if self._out_SV is None or self._out_SV.shape[0] < shape.size:
            self._out_SV = torch.empty_like(logits_SV)
        return self._out_SV[: shape.size].copy_(logits_SV)

    def _step(self, shape: GraphShape) -> PaddedStep:
        if shape not in self._steps:
            self._steps[shape] = PaddedStep(
                shape.size,
                self._blocks,
                self._tokens,
                self._decoding,
                shape.kind,
                self.descriptors.table,
                self.vectors,
            )
        return self._steps[shape]

    def _serving_of(self, needed: GraphShape) -> GraphShape | None:
        """The smallest captured shape that holds it: of its own kind, or else of one with more parts."""
        if needed not in self._serving:
            size, kind = needed
            found = (f for f in self._captured if f.size >= size and kind in f.kind)
            self._serving[needed] = min(found, key=lambda f: (KINDS.index(f.kind), f), default=None)
        return self._serving[needed]


def _padded_size(num: int) -> int:
    return next(size for size in SIZES if size >= num)


def _unless_full(call: Callable[[], T]) -> T | None:
    """Call it; None if the device's memory is too small."""
    try:
        return call()
    except RuntimeError as e:
        if not is_out_of_memory(e):
            raise
        return None


class GraphCapturer:
    """Captures CUDA graphs that share their memory, since only one is replayed at a time. The run before a capture is
    silent, then collectives are called that it would have been the first to need, and what is captured is not executed.
    """

    def __init__(self, device: torch.device, ranks: CaptureBarrier) -> None:
        self._device, self._memory, self._ranks = device, torch.cuda.graph_pool_handle(), ranks
        # One for all captures, since cuBLAS keeps a workspace for each stream: 32 MiB on a card of 2022.
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Capture]:
        """Run once, which compiles kernels and initialises libraries."""
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), self._ranks.silent():
            run()
        current.wait_stream(self._stream)
        return lambda: self._capture(run)

    def _capture(self, run: Callable[[], Tensor]) -> Capture:
        with torch.cuda.stream(self._stream):
            self._ranks.connect()
        graph = torch.cuda.CUDAGraph()
        # Threads that load adapters may allocate pinned memory meanwhile, which must not break this capture.
        with torch.cuda.graph(graph, pool=self._memory, stream=self._stream, capture_error_mode="thread_local"):
            out = run()
        return Capture(graph.replay, out)

    def num_bytes(self) -> int:
        """Count what the whole device has in use, without what torch keeps free: graphs take the driver's too."""
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free

    def release(self) -> None:
        torch.cuda.empty_cache()  # memory that no graph shares any more cannot be captured into: the next has another
        self._memory = torch.cuda.graph_pool_handle()
