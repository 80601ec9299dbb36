"""Decode steps of base-model requests as CUDA graphs: a step's launches are recorded once and replayed by one call.

A graph contains addresses, so whatever changes from step to step is copied into tensors that stay in place. A step is
padded to the next size that has a graph: padding sequences have no context, and their keys and values are not written.
Steps with adapters are not recorded, because the length of their tables changes from step to step.

Recording has not run on a GPU yet. All else is tested on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from loray_kernels.cuda.tables import SPLIT, Attention, Items
from loray_kernels.ops import AttentionMeta, DecodeStep, KvLayout

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class PaddedStep:
    """A step of `size` sequences with up to `max_blocks` blocks each, in tensors that stay in place."""

    def __init__(self, size: int, max_blocks: int, layout: KvLayout, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.int64, device=device)

        numbers = torch.arange(size + 1, device=device)
        self._context_S, self._blocks_SB = zeros(size), zeros(size, max_blocks)
        slots_S = torch.full((size,), -1, dtype=torch.int64, device=device)
        meta = AttentionMeta(tuple(range(size + 1)), (0,) * size, tuple(self._blocks_SB), slots_S)
        meta.memo["cuda"] = Attention(
            query_start=numbers,
            context_len=self._context_S,
            table_start=numbers[:size] * max_blocks,
            blocks=self._blocks_SB.view(-1),
            decoded=Items(numbers[:size].repeat_interleave(2).contiguous(), size),
            prefilled=Items(zeros(0), 0),
            max_splits=-(-max_blocks * layout.block_tokens // SPLIT),
        )
        self.step = DecodeStep(zeros(size), zeros(size), meta)

    def fill(self, step: DecodeStep) -> None:
        """Copy a step of at most `size` sequences; the rest is padding. Writes this step's tensors."""
        num, meta = step.token_ids_S.shape[0], step.attention
        blocks = torch.nn.utils.rnn.pad_sequence(list(meta.block_table), batch_first=True)
        self.step.token_ids_S[:num] = step.token_ids_S
        self.step.positions_S[:num] = step.positions_S
        self.step.attention.slots_T.fill_(-1)[:num] = meta.slots_T
        self._blocks_SB[:num, : blocks.shape[1]] = blocks
        self._context_S.zero_()[:num] = torch.tensor(meta.context_len).to(self._context_S.device)


class Recording(NamedTuple):
    """`replay` repeats the recorded launches on the current stream, and so overwrites `out`."""

    replay: Callable[[], None]
    out: Tensor


Record = Callable[[Callable[[], Tensor]], Recording]


class DecodeGraphs:
    """See `Ops.recorded`. A size is recorded when it is first needed. `record` makes a CUDA graph by default."""

    def __init__(
        self,
        forward: Callable[[DecodeStep], Tensor],
        layout: KvLayout,
        max_blocks: int,
        device: torch.device,
        record: Record | None = None,
    ) -> None:
        self._forward, self._layout, self._max_blocks, self._device = forward, layout, max_blocks, device
        self._record = record or GraphRecorder(device)
        self._recorded: dict[int, tuple[PaddedStep, Recording]] = {}

    def __call__(self, step: DecodeStep) -> Tensor:
        """A step with more sequences than the largest size is not replayed."""
        num = step.token_ids_S.shape[0]
        size = next((s for s in SIZES if s >= num), None)
        if size is None:
            return self._forward(step)
        if size not in self._recorded:
            padded = PaddedStep(size, self._max_blocks, self._layout, self._device)
            self._recorded[size] = padded, self._record(lambda: self._forward(padded.step))
        padded, recording = self._recorded[size]
        padded.fill(step)
        recording.replay()
        return recording.out[:num]


class GraphRecorder:
    """CUDA graphs that share their memory, since only one is replayed at a time."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._memory = device, torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Recording:
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):  # compiles kernels and initialises libraries before the recording
            run()
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Threads that load adapters may allocate pinned memory meanwhile, which must not break this recording.
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            out = run()
        return Recording(graph.replay, out)
