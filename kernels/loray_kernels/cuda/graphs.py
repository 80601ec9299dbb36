"""Decode steps of base-model requests as CUDA graphs: a step's launches are recorded once and replayed by one call.

A graph holds addresses, so whatever changes from step to step is copied into tensors of its own. A step is padded to
the next size that has a graph: padding sequences have no keys, and their keys go nowhere. Steps with adapters are not
recorded: their tables differ in length from step to step.

Not run yet: there was no GPU. The padding is tested on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from loray_kernels.cuda.tables import SPLIT, Attention, Items
from loray_kernels.ops import AttentionMeta, KvLayout

SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class DecodeStep(NamedTuple):
    """One token for each of S sequences."""

    token_ids_S: Tensor
    positions_S: Tensor
    attention: AttentionMeta


class PaddedStep:
    """A step of `size` sequences with up to `max_blocks` blocks each, in tensors that stay where they are."""

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
        """Take over a step of at most so many sequences; the rest is padding. Writes the step's tensors."""
        num, meta = step.token_ids_S.shape[0], step.attention
        blocks = torch.nn.utils.rnn.pad_sequence(list(meta.block_table), batch_first=True)
        self.step.token_ids_S[:num] = step.token_ids_S
        self.step.positions_S[:num] = step.positions_S
        self.step.attention.slots_T.fill_(-1)[:num] = meta.slots_T
        self._blocks_SB[:num, : blocks.shape[1]] = blocks
        self._context_S.zero_()[:num] = torch.tensor(meta.context_len).to(self._context_S.device)


class DecodeGraphs:
    """`forward` gives a row for each sequence and must do the same launches whatever the step's values."""

    def __init__(
        self, forward: Callable[[DecodeStep], Tensor], layout: KvLayout, max_blocks: int, device: torch.device
    ) -> None:
        self._forward, self._layout, self._max_blocks, self._device = forward, layout, max_blocks, device
        self._recorded: dict[int, tuple[torch.cuda.CUDAGraph, PaddedStep, Tensor]] = {}

    def __call__(self, step: DecodeStep) -> Tensor:
        """What `forward` gives; the next call overwrites it. More sequences than the largest size are not replayed."""
        num = step.token_ids_S.shape[0]
        size = next((s for s in SIZES if s >= num), None)
        if size is None:
            return self._forward(step)
        if size not in self._recorded:
            self._recorded[size] = self._record(size)
        graph, padded, out = self._recorded[size]
        padded.fill(step)
        graph.replay()
        return out[:num]

    def _record(self, size: int) -> tuple[torch.cuda.CUDAGraph, PaddedStep, Tensor]:
        padded = PaddedStep(size, self._max_blocks, self._layout, self._device)
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(side):  # kernels are compiled and libraries set up before anything is recorded
            self._forward(padded.step)
        torch.cuda.current_stream(self._device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = self._forward(padded.step)
        return graph, padded, out
